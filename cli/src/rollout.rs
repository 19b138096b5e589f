//! `fwpush rollout`, and what `fwpush release` does after publishing.

use fwpush_keys::{ReleaseId, RolloutId, Timestamp};
use fwpush_proto::v1::{
    AbortRolloutRequest, Action, GetRolloutRequest, ListRolloutDevicesRequest, ListRolloutsRequest,
    Phase, Rollout, RolloutDevice, RolloutPreview, RolloutState, StartRolloutRequest,
};
use serde_json::json;

use crate::{
    Context,
    args::{RolloutAbort, RolloutArgs, RolloutCommand, RolloutList, RolloutShow, RolloutStart},
    client::Client,
    failure::{Failure, Result},
    limits,
    output::{ask, can_ask, plural},
    progress::count,
    values::Target,
    views, watch,
};

/// Rows of one page of a rollout's devices.
const PAGE: u32 = 1_000;

/// Runs the command.
pub async fn run(context: &Context, args: &RolloutArgs) -> Result<()> {
    match &args.command {
        RolloutCommand::List(args) => list(context, args).await,
        RolloutCommand::Show(args) => show(context, args).await,
        RolloutCommand::Start(args) => start(context, args).await,
        RolloutCommand::Abort(args) => abort(context, args).await,
    }
}

async fn list(context: &Context, args: &RolloutList) -> Result<()> {
    let client = context.client().await?;
    let request = ListRolloutsRequest { limit: args.limit };
    let answer = client
        .call("list the rollouts", async |admin| {
            admin.list_rollouts(request).await
        })
        .await?;
    context.out.data(
        || json!({ "rollouts": answer.rollouts.iter().map(views::rollout_json).collect::<Vec<_>>() }),
        || views::rollouts_text(&answer.rollouts),
    )
}

async fn show(context: &Context, args: &RolloutShow) -> Result<()> {
    let mut client = context.client().await?;
    if args.follow {
        let rollout = watch::follow(&mut client, &args.id).await?;
        context.out.data(
            || views::rollout_json(&rollout),
            || outcome_text(&rollout, false),
        )?;
        return watch::verdict(&rollout);
    }
    let request = GetRolloutRequest {
        rollout_id: args.id.to_string(),
    };
    let rollout = client
        .call("show the rollout", async |admin| {
            admin.get_rollout(request).await
        })
        .await?;
    if !args.devices && args.phase.is_none() {
        return context.out.data(
            || views::rollout_json(&rollout),
            || views::rollout_text(&rollout),
        );
    }
    let phase = args.phase.map_or(Phase::Unspecified, Phase::from);
    let devices = devices(&client, &args.id, phase, args.limit).await?;
    context.out.data(
        || {
            let devices: Vec<_> = devices.iter().map(views::rollout_device_json).collect();
            json!({ "rollout": views::rollout_json(&rollout), "devices": devices })
        },
        || {
            format!(
                "{}\n{}",
                views::rollout_text(&rollout),
                views::rollout_devices_text(&devices)
            )
        },
    )
}

/// Devices of a rollout in a phase (or in any, for UNSPECIFIED), page by page up to `limit`.
async fn devices(
    client: &Client,
    id: &RolloutId,
    phase: Phase,
    limit: u32,
) -> Result<Vec<RolloutDevice>> {
    let mut devices: Vec<RolloutDevice> = Vec::new();
    loop {
        let left = limit - u32::try_from(devices.len()).unwrap_or(limit).min(limit);
        let request = ListRolloutDevicesRequest {
            rollout_id: id.to_string(),
            phase: phase.into(),
            after: devices
                .last()
                .map(|device| device.client_id.clone())
                .unwrap_or_default(),
            limit: left.min(PAGE),
        };
        let asked = request.limit as usize;
        let page = client
            .call("list the rollout's devices", async |admin| {
                admin.list_rollout_devices(request).await
            })
            .await?
            .devices;
        let last = page.len() < asked;
        devices.extend(page);
        if last || devices.len() >= limit as usize {
            return Ok(devices);
        }
    }
}

async fn start(context: &Context, args: &RolloutStart) -> Result<()> {
    let consent = Consent::before(args.yes, args.dry_run)?;
    let mut client = context.client().await?;
    let start = Start {
        rollout_id: RolloutId::new_v7(Timestamp::now()),
        release_id: args.release,
        target: args.to.clone(),
        action: if args.rollback {
            Action::Rollback
        } else {
            Action::Install
        },
        consent,
    };
    if args.dry_run {
        let preview = preview(&client, &start).await?;
        return context.out.data(
            || views::preview_json(&preview),
            || views::preview_text(&preview),
        );
    }
    let rollout = begin(context, &mut client, &start, || ()).await?;
    let rollout = if args.detach {
        rollout
    } else {
        follow(&mut client, &rollout).await?
    };
    context.out.data(
        || views::rollout_json(&rollout),
        || outcome_text(&rollout, args.detach),
    )?;
    if args.detach {
        Ok(())
    } else {
        watch::verdict(&rollout)
    }
}

async fn abort(context: &Context, args: &RolloutAbort) -> Result<()> {
    if Consent::before(args.yes, false)? == Consent::Ask
        && !ask(&format!("Stop rollout {}?", args.id))?
    {
        return Err(Failure::new("the rollout goes on").next(format!(
            "To see it: fwpush rollout show {} --follow",
            args.id
        )));
    }
    let client = context.client().await?;
    let request = AbortRolloutRequest {
        rollout_id: args.id.to_string(),
    };
    let rollout = client
        .call("abort the rollout", async |admin| {
            admin.abort_rollout(request).await
        })
        .await?;
    context.out.data(
        || views::rollout_json(&rollout),
        || views::rollout_text(&rollout),
    )
}

/// Whether a person has agreed to what will happen, or can be asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Consent {
    /// With `--yes`.
    Given,
    /// To be asked for on the terminal.
    Ask,
}

impl Consent {
    /// Refused before any work where nobody can be asked later.
    pub fn before(yes: bool, dry_run: bool) -> Result<Self> {
        match (yes || dry_run, can_ask()) {
            (true, _) => Ok(Self::Given),
            (false, true) => Ok(Self::Ask),
            (false, false) => Err(Failure::usage(
                "there is no terminal to ask on before devices are changed",
            )
            .next("Add --yes if you are sure; releases and rollouts show whom they would reach with --dry-run.")),
        }
    }
}

/// What to start.
#[derive(Clone, Debug)]
pub struct Start {
    /// Nothing starts twice under it.
    pub rollout_id: RolloutId,
    pub release_id: ReleaseId,
    pub target: Target,
    pub action: Action,
    pub consent: Consent,
}

impl Start {
    fn request(&self, rollout_id: String) -> StartRolloutRequest {
        StartRolloutRequest {
            rollout_id,
            release_id: self.release_id.to_string(),
            target: Some(self.target.to_proto()),
            action: self.action.into(),
            ..StartRolloutRequest::default()
        }
    }
}

async fn preview(client: &Client, start: &Start) -> Result<RolloutPreview> {
    let request = start.request(String::new());
    client
        .call("ask whom the rollout would reach", async |admin| {
            admin.preview_rollout(request).await
        })
        .await
}

/// The rollout with this id; `None` where there is none.
pub async fn find(client: &Client, id: &RolloutId) -> Result<Option<Rollout>> {
    let request = GetRolloutRequest {
        rollout_id: id.to_string(),
    };
    let found = client
        .try_call(async |admin| admin.get_rollout(request).await)
        .await;
    match found {
        Ok(rollout) => Ok(Some(rollout)),
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(client.refused("look for the rollout", &status)),
    }
}

/// Shows whom the rollout would reach, asks where it must, and starts it. `starting` runs right before.
pub async fn begin(
    context: &Context,
    client: &mut Client,
    start: &Start,
    starting: impl FnOnce(),
) -> Result<Rollout> {
    let preview = preview(client, start).await?;
    let later = format!(
        "fwpush rollout start --release {} --to ...",
        start.release_id
    );
    context.out.say(views::preview_text(&preview).trim_end());
    if preview.eligible == 0 && start.target != Target::All {
        return Err(Failure::new(
            "the release fits none of the named devices: no rollout was started",
        )
        .next(format!("The reasons stand above. Later: {later}")));
    }
    if start.consent == Consent::Ask {
        if let Some(warning) = all_at_once(start, &preview) {
            context.out.say(&warning);
        }
        let verb = if start.action == Action::Rollback {
            "Roll back"
        } else {
            "Update"
        };
        if !ask(&format!("{verb} {}?", plural(preview.eligible, "device")))? {
            return Err(
                Failure::new("no rollout was started").next(format!("To start it later: {later}"))
            );
        }
    }
    starting();
    let request = start.request(start.rollout_id.to_string());
    // It carries its own id, so that nothing starts twice.
    client
        .call_again("start the rollout", async |admin| {
            admin.start_rollout(request.clone()).await
        })
        .await
}

/// One bad image for everybody at once is how fleets are lost.
fn all_at_once(start: &Start, preview: &RolloutPreview) -> Option<String> {
    let many = start.target == Target::All && preview.eligible > limits::ALL_AT_ONCE_DEVICES;
    many.then(|| {
        format!(
            "warning: this offers the release to all {} devices at once. Try it on a few first: --to ID,ID,...",
            preview.eligible
        )
    })
}

/// Shows progress until the rollout has ended.
pub async fn follow(client: &mut Client, rollout: &Rollout) -> Result<Rollout> {
    let id = rollout.rollout_id.parse().map_err(|_| {
        Failure::new("the server's answer names no rollout").next("Is it a newer server?")
    })?;
    watch::follow(client, &id).await
}

/// How a rollout ended, in a sentence or two.
pub fn outcome_text(rollout: &Rollout, detached: bool) -> String {
    let id = &rollout.rollout_id;
    if detached {
        return format!("Rollout {id} has started. Watch it: fwpush rollout show {id} --follow\n");
    }
    let updated = count(rollout, Phase::Succeeded);
    let mut text = format!(
        "Rollout {id} is {}: {updated} of {} updated to {} {}.\n",
        views::state_words(rollout.state()),
        plural(rollout.targeted, "device"),
        rollout.product,
        rollout.version
    );
    let pending = count(rollout, Phase::Pending);
    if pending > 0 && rollout.state() == RolloutState::Complete {
        text.push_str(&format!(
            "{} not connected yet: offered the release on connecting, while the rollout stays open.\n",
            if pending == 1 { "1 device is".to_owned() } else { format!("{pending} devices are") }
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(target: Target) -> Start {
        let release_id = ReleaseId::new_v7(Timestamp::from_ms(0));
        Start {
            rollout_id: RolloutId::new_v7(Timestamp::from_ms(0)),
            release_id,
            target,
            action: Action::Install,
            consent: Consent::Given,
        }
    }

    #[test]
    fn everybody_at_once_is_warned_of() {
        let preview = |eligible| RolloutPreview {
            eligible,
            ..RolloutPreview::default()
        };
        assert!(all_at_once(&start(Target::All), &preview(1_000)).is_some());
        assert!(all_at_once(&start(Target::All), &preview(3)).is_none());
        assert!(all_at_once(&start("a,b".parse().unwrap()), &preview(1_000)).is_none());
    }

    #[test]
    fn consent_is_not_needed_twice() {
        assert_eq!(Consent::before(true, false).unwrap(), Consent::Given);
        assert_eq!(Consent::before(false, true).unwrap(), Consent::Given);
    }
}
