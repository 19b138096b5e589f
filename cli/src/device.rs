//! `fwpush device`, but for `add`, which is [`crate::enroll`].

use fwpush_keys::DeviceId;
use fwpush_proto::v1::{
    BlockDeviceRequest, Device, GetDeviceRequest, ListDevicesRequest, PingDeviceRequest,
    PushResult, RemoveDeviceRequest, SendTextRequest, SetDeviceEventsRequest, UnblockDeviceRequest,
};
use serde_json::json;

use crate::{
    Context,
    args::{
        DeviceArgs, DeviceBlock, DeviceCommand, DeviceEvents, DeviceList, DevicePing, DeviceRemove,
        DeviceShow, DeviceText, DeviceUnblock,
    },
    enroll,
    failure::{Failure, Result},
    output::{ask, can_ask},
    views,
};

/// Rows of one page: the server's bound.
const PAGE: u32 = 1_000;

/// Runs the command.
pub async fn run(context: &Context, args: &DeviceArgs) -> Result<()> {
    match &args.command {
        DeviceCommand::List(args) => list(context, args).await,
        DeviceCommand::Show(args) => show(context, args).await,
        DeviceCommand::Add(args) => enroll::run(context, args).await,
        DeviceCommand::Block(args) => block(context, args).await,
        DeviceCommand::Unblock(args) => unblock(context, args).await,
        DeviceCommand::Remove(args) => remove(context, args).await,
        DeviceCommand::Text(args) => text(context, args).await,
        DeviceCommand::Ping(args) => ping(context, args).await,
        DeviceCommand::Events(args) => events(context, args).await,
    }
}

async fn list(context: &Context, args: &DeviceList) -> Result<()> {
    let client = context.client().await?;
    let mut devices: Vec<Device> = Vec::new();
    let (mut after, limit) = (
        args.after
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        args.limit as usize,
    );
    let (total, online_of) = loop {
        let left = u32::try_from(limit - devices.len()).unwrap_or(PAGE);
        let request = ListDevicesRequest {
            product: args
                .product
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            online_only: args.online,
            after: after.clone(),
            limit: left.min(PAGE),
        };
        let answer = client
            .call("list the devices", async |admin| {
                admin.list_devices(request).await
            })
            .await?;
        let last = answer.devices.last().map(|device| device.client_id.clone());
        devices.extend(answer.devices);
        match last {
            // A page may be short where the server filters it; only an empty one is the end.
            Some(last) if devices.len() < limit => after = last,
            _ => break (answer.total, answer.online_of_node),
        }
    };
    context.out.data(
        || {
            let mut list = json!({ "devices": devices.iter().map(views::device_json).collect::<Vec<_>>(), "total": total });
            if !online_of.is_empty() {
                list["online_of_node"] = online_of.as_str().into();
            }
            list
        },
        || views::devices_text(&devices),
    )?;
    if !online_of.is_empty() {
        context.out.say(&format!(
            "Redis is away: only those on {online_of} are known to be online."
        ));
    }
    if let (Some(last), true) = (devices.last(), devices.len() >= limit) {
        context.out.say(&format!(
            "{} shown; more with --after {}",
            devices.len(),
            last.client_id
        ));
    }
    Ok(())
}

async fn show(context: &Context, args: &DeviceShow) -> Result<()> {
    let client = context.client().await?;
    let request = GetDeviceRequest {
        client_id: args.id.to_string(),
    };
    let detail = client
        .call("show the device", async |admin| {
            admin.get_device(request).await
        })
        .await?;
    context.out.data(
        || views::device_detail_json(&detail),
        || views::device_detail_text(&detail),
    )
}

fn print(context: &Context, device: &Device) -> Result<()> {
    context
        .out
        .data(|| views::device_json(device), || views::device_text(device))
}

async fn block(context: &Context, args: &DeviceBlock) -> Result<()> {
    let client = context.client().await?;
    let request = BlockDeviceRequest {
        client_id: args.id.to_string(),
        reason: args.reason.clone(),
    };
    let device = client
        .call("block the device", async |admin| {
            admin.block_device(request).await
        })
        .await?;
    print(context, &device)
}

async fn unblock(context: &Context, args: &DeviceUnblock) -> Result<()> {
    let client = context.client().await?;
    let request = UnblockDeviceRequest {
        client_id: args.id.to_string(),
    };
    let device = client
        .call("unblock the device", async |admin| {
            admin.unblock_device(request).await
        })
        .await?;
    print(context, &device)
}

async fn remove(context: &Context, args: &DeviceRemove) -> Result<()> {
    let id = &args.id;
    if !args.yes {
        if !can_ask() {
            return Err(Failure::usage(
                "there is no terminal to ask on before a device is removed",
            )
            .next("Add --yes."));
        }
        if !ask(&format!(
            "Forget device {id}, its history and its certificate?"
        ))? {
            return Err(Failure::new("nothing was removed"));
        }
    }
    let client = context.client().await?;
    let request = RemoveDeviceRequest {
        client_id: id.to_string(),
    };
    client
        .call("remove the device", async |admin| {
            admin.remove_device(request).await
        })
        .await?;
    context.out.data(
        || json!({ "removed": id }),
        || format!("Device {id} is removed; its certificate is refused.\n"),
    )
}

async fn text(context: &Context, args: &DeviceText) -> Result<()> {
    let client = context.client().await?;
    let request = SendTextRequest {
        client_id: args.id.to_string(),
        text: args.text.clone(),
    };
    let sent = client
        .call("send the text", async |admin| {
            admin.send_text(request).await
        })
        .await?;
    context.out.data(
        || json!({ "outcome": sent.outcome, "node_id": sent.node_id }),
        || format!("{}\n", outcome_words(&sent)),
    )?;
    delivered(
        &sent,
        &args.id,
        "Texts are not kept: send it again when the device is online.",
    )
}

async fn ping(context: &Context, args: &DevicePing) -> Result<()> {
    let client = context.client().await?;
    let request = PingDeviceRequest {
        client_id: args.id.to_string(),
    };
    let sent = client
        .call("ask the device", async |admin| {
            admin.ping_device(request).await
        })
        .await?;
    let answered = sent.answered_us > 0;
    context.out.data(
        || {
            json!({
                "outcome": sent.outcome,
                "node_id": sent.node_id,
                "answered_us": answered.then_some(sent.answered_us),
            })
        },
        || match answered {
            true => format!(
                "{}, answered in {}\n",
                outcome_words(&sent),
                views::milliseconds(sent.answered_us)
            ),
            false => format!("{}\n", outcome_words(&sent)),
        },
    )?;
    delivered(
        &sent,
        &args.id,
        "`fwpush device show` says when it was last seen.",
    )?;
    if answered {
        return Ok(());
    }
    Err(Failure::new(format!("device {} did not answer within 10 s", args.id)).next(
        "Its link may be very slow, or its agent older than `ping`: `fwpush device show` says which it has.",
    ))
}

fn outcome_words(sent: &PushResult) -> String {
    let (outcome, node) = (&sent.outcome, &sent.node_id);
    crate::output::escape(&format!("{outcome} (node {node})")).into_owned()
}

fn delivered(sent: &PushResult, id: &DeviceId, if_not_here: &str) -> Result<()> {
    match sent.outcome.as_str() {
        "DELIVERED" => Ok(()),
        "NOT_HERE" => Err(Failure::new(format!("device {id} is not connected")).next(if_not_here)),
        "BUSY" => Err(
            Failure::new(format!("device {id} reads too slowly: its queue is full"))
                .next("Try again in a while."),
        ),
        "STALE_EPOCH" => Err(
            Failure::new(format!("device {id} was changing to another stream")).next("Try again."),
        ),
        other => Err(Failure::new(format!("not delivered: {other}")).next("Try again in a while.")),
    }
}

async fn events(context: &Context, args: &DeviceEvents) -> Result<()> {
    let client = context.client().await?;
    let request = SetDeviceEventsRequest {
        client_id: args.id.to_string(),
        hears: args.hears.clone(),
    };
    let device = client
        .call("set whose events the device hears", async |admin| {
            admin.set_device_events(request).await
        })
        .await?;
    print(context, &device)
}
