//! Devices: records, certificates, blocks, texts.

use fwpush_keys::id::{DeviceId, OperatorId, Product};
use fwpush_proto::v1::{self, ServerMessage, TextMessage, server_message::Kind as ToDevice};
use tonic::{Code, Status};

use super::{Admin, id, optional_id, page, views, words};
use crate::{
    api::{node::in_us, status as map},
    db::{DeviceFilter, DeviceRecord},
    devices::{DeviceError, Request},
    limits, rollouts,
    route::{PushError, Pushed},
};

fn refused(error: DeviceError) -> Status {
    let (code, next) = match &error {
        DeviceError::Db(_) => (Code::Unavailable, String::new()),
        DeviceError::NotFound(_) => (
            Code::NotFound,
            "`fwpush device list` shows those there are.".to_owned(),
        ),
        DeviceError::Conflict(device) => (
            Code::AlreadyExists,
            format!("Choose another id, or remove that one: fwpush device remove {device}"),
        ),
        DeviceError::UnknownProduct(product) => (
            Code::FailedPrecondition,
            format!("Add it: fwpush keys rotate-root --add-product {product}"),
        ),
        DeviceError::Unreadable(_) | DeviceError::Nameless(_) => {
            (Code::Internal, "The server's log says more.".to_owned())
        }
        DeviceError::Days => (
            Code::InvalidArgument,
            format!("--days takes 1 to {}.", limits::CERTIFICATE_DAYS_MAX),
        ),
        DeviceError::Hears => (
            Code::InvalidArgument,
            "Name fewer devices, or `*` for all of the product.".to_owned(),
        ),
        DeviceError::Certificate(_) => (
            Code::InvalidArgument,
            "Make the request anew with an ECDSA P-256 key, or let --out DIR make key and request."
                .to_owned(),
        ),
    };
    match error {
        DeviceError::Db(error) => map::db(error),
        error => map::with_next(Status::new(code, words(&error)), next),
    }
}

pub async fn add(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::AddDeviceRequest,
) -> Result<v1::AddDeviceResponse, Status> {
    let product: Product = id("product", &request.product)?;
    if !admin.trust.root().products.contains_key(&product) {
        return Err(refused(DeviceError::UnknownProduct(product)));
    }
    let channel = if request.channel.is_empty() {
        "stable"
    } else {
        &request.channel
    };
    let asked = Request {
        device: id("client_id", &request.client_id)?,
        product,
        hw_id: id("hw_id", &request.hw_id)?,
        hw_rev: request.hw_rev,
        channel: id("channel", channel)?,
        csr: Some(request.csr_pem).filter(|csr| !csr.is_empty()),
        days: request.days,
    };
    let (record, certificate) = admin
        .devices
        .add(asked, operator.as_str())
        .await
        .map_err(refused)?;
    let about = &admin.about;
    Ok(v1::AddDeviceResponse {
        device: Some(shown(admin, &record).await),
        certificate_pem: certificate.unwrap_or_default(),
        node_ca_pem: about.node_ca_pem.clone(),
        trust_domain: about.trust_domain.to_string(),
        server_addresses: about.device_addresses.clone(),
        root: admin.trust.roots().into_iter().next().unwrap_or_default(),
    })
}

pub async fn list(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListDevicesRequest,
) -> Result<v1::ListDevicesResponse, Status> {
    let product: Option<Product> = optional_id("product", &request.product)?;
    let limit = page(request.limit);
    let total = admin
        .db
        .count_devices(product.as_ref())
        .await
        .map_err(map::db)?;
    let mut after: Option<DeviceId> = optional_id("after", &request.after)?;
    let mut devices = Vec::new();
    // With `online_only`, pages of the database are gone through until one page of answers is full.
    loop {
        let filter = DeviceFilter {
            product: product.clone(),
            after: after.clone(),
            limit,
        };
        let records = admin.db.list_devices(&filter).await.map_err(map::db)?;
        let whole_page = records.len() == limit as usize;
        after = records.last().map(|record| record.client_id.clone());
        let ids: Vec<DeviceId> = records
            .iter()
            .map(|record| record.client_id.clone())
            .collect();
        let online = admin.route.online(&ids).await;
        let wanted = records
            .iter()
            .map(|record| (record, online.contains(&record.client_id)))
            .filter(|(_, online)| *online || !request.online_only)
            .map(|(record, online)| views::device(record, online));
        devices.extend(wanted.take(limit as usize - devices.len()));
        if !whole_page || devices.len() == limit as usize {
            let online_of_node = admin.route.sees_only().map(ToString::to_string);
            return Ok(v1::ListDevicesResponse {
                devices,
                total,
                online_of_node: online_of_node.unwrap_or_default(),
            });
        }
    }
}

pub async fn get(
    admin: &Admin,
    _: &OperatorId,
    request: v1::GetDeviceRequest,
) -> Result<v1::DeviceDetail, Status> {
    let device: DeviceId = id("client_id", &request.client_id)?;
    let record = admin.devices.get(&device).await.map_err(refused)?;
    let updates = rollouts::updates_of(&admin.db, &device, limits::DEVICE_UPDATES_SHOWN)
        .await
        .map_err(super::rollouts::refused)?;
    let events = admin
        .db
        .events_of(&device, limits::DEVICE_EVENTS_SHOWN)
        .await
        .map_err(map::db)?;
    Ok(v1::DeviceDetail {
        device: Some(shown(admin, &record).await),
        updates: updates.iter().map(views::rollout_device).collect(),
        events: events.into_iter().map(views::event).collect(),
    })
}

pub async fn block(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::BlockDeviceRequest,
) -> Result<v1::Device, Status> {
    let device = id("client_id", &request.client_id)?;
    let reason = crate::wire::cut(&request.reason);
    let blocked = admin
        .devices
        .block(&device, &reason, operator.as_str())
        .await;
    Ok(shown(admin, &blocked.map_err(refused)?).await)
}

pub async fn unblock(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::UnblockDeviceRequest,
) -> Result<v1::Device, Status> {
    let device = id("client_id", &request.client_id)?;
    let unblocked = admin.devices.unblock(&device, operator.as_str()).await;
    Ok(shown(admin, &unblocked.map_err(refused)?).await)
}

pub async fn remove(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::RemoveDeviceRequest,
) -> Result<v1::RemoveDeviceResponse, Status> {
    let device = id("client_id", &request.client_id)?;
    admin
        .devices
        .remove(&device, operator.as_str())
        .await
        .map_err(refused)?;
    Ok(v1::RemoveDeviceResponse {})
}

pub async fn set_events(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::SetDeviceEventsRequest,
) -> Result<v1::Device, Status> {
    let device = id("client_id", &request.client_id)?;
    let changed = admin
        .devices
        .set_hears(&device, request.hears, operator.as_str())
        .await;
    Ok(shown(admin, &changed.map_err(refused)?).await)
}

pub async fn send_text(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::SendTextRequest,
) -> Result<v1::PushResult, Status> {
    let device: DeviceId = id("client_id", &request.client_id)?;
    if request.text.is_empty() || request.text.len() > limits::MESSAGE_TEXT_BYTES {
        let most = limits::MESSAGE_TEXT_BYTES;
        return Err(Status::invalid_argument(format!(
            "a text has 1 to {most} bytes"
        )));
    }
    admin.devices.get(&device).await.map_err(refused)?;
    let message = ServerMessage {
        kind: Some(ToDevice::Text(TextMessage { text: request.text })),
    };
    let pushed = admin.route.push(&device, message).await;
    let pushed = pushed.map_err(unreachable)?;
    tracing::info!(
        device.id = %device, operator.id = %operator, node.id = %pushed.node, outcome = ?pushed.outcome,
        "An operator sent a text."
    );
    Ok(push_result(pushed))
}

pub async fn ping(
    admin: &Admin,
    _: &OperatorId,
    request: v1::PingDeviceRequest,
) -> Result<v1::PushResult, Status> {
    let device: DeviceId = id("client_id", &request.client_id)?;
    admin.devices.get(&device).await.map_err(refused)?;
    let pushed = admin.route.ping(&device).await;
    Ok(push_result(pushed.map_err(unreachable)?))
}

fn push_result(pushed: Pushed) -> v1::PushResult {
    let outcome = pushed.outcome.as_str_name();
    v1::PushResult {
        outcome: outcome.trim_start_matches("PUSH_OUTCOME_").to_owned(),
        node_id: pushed.node.to_string(),
        answered_us: pushed.answered.map_or(0, in_us),
    }
}

fn unreachable(error: PushError) -> Status {
    Status::unavailable(error.to_string())
}

async fn shown(admin: &Admin, record: &DeviceRecord) -> v1::Device {
    let one = std::slice::from_ref(&record.client_id);
    views::device(record, !admin.route.online(one).await.is_empty())
}
