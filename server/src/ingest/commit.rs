//! The committing task.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use fwpush_keys::id::{DeviceId, Product};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{AckSink, Acked, Ingest, queue::Item};
use crate::{
    db::{Db, DbError, engine::On, states},
    desired::{join, state::DeviceState},
    limits,
    session::Sessions,
};

/// Commits group after group until `stop`, then what is left.
pub(super) async fn run(ingest: Ingest, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = ingest.queue().wait() => {}
            () = stop.cancelled() => break,
        }
        gather(&ingest, &stop).await;
        let group = ingest.queue().take(limits::STATE_ROWS);
        commit(&ingest, group, &stop).await;
    }
    let deadline = Instant::now() + limits::FLUSH_TIME;
    while ingest.queue().len() > 0 && Instant::now() < deadline {
        let group = ingest.queue().take(limits::STATE_ROWS);
        commit(&ingest, group, &stop).await;
    }
}

/// Waits for a group worth its commit.
async fn gather(ingest: &Ingest, stop: &CancellationToken) {
    let until = Instant::now() + limits::GROUP_WAIT;
    while ingest.queue().len() < limits::GROUP_READY
        && Instant::now() < until
        && !stop.is_cancelled()
    {
        sleep(limits::GROUP_WAIT / 10).await;
    }
}

/// Commits a group, however often it takes. What the database refuses for its content is narrowed down and dropped,
/// unacknowledged, so that one bad item holds nobody else up. After `stop` it tries no longer than [`limits::FLUSH_TIME`].
async fn commit(ingest: &Ingest, group: Vec<Item>, stop: &CancellationToken) {
    let mut groups = vec![group];
    let mut pause = limits::RETRY_MIN;
    let mut give_up = None;
    while let Some(mut group) = groups.pop() {
        let Err(error) = commit_once(ingest.db(), ingest.sessions(), &group).await else {
            registered(group);
            pause = limits::RETRY_MIN;
            continue;
        };
        if error.is_transient() {
            let items = group.len();
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                items,
                "Reports wait: the database cannot be written."
            );
            if stop.is_cancelled()
                && Instant::now()
                    >= *give_up.get_or_insert_with(|| Instant::now() + limits::FLUSH_TIME)
            {
                return;
            }
            pause_for(pause, stop).await;
            pause = (pause * 2).min(limits::RETRY_MAX);
            groups.push(group);
        } else if group.len() > 1 {
            let second = group.split_off(group.len() / 2);
            groups.extend([second, group]);
        } else if let Some(item) = group.pop() {
            drop_item(ingest, item, error);
        }
    }
}

/// A pause that a stop cuts to the shortest.
async fn pause_for(pause: Duration, stop: &CancellationToken) {
    tokio::select! {
        () = sleep(pause) => {}
        () = stop.cancelled() => sleep(limits::RETRY_MIN).await,
    }
}

fn drop_item(ingest: &Ingest, item: Item, error: DbError) {
    tracing::error!(
        device.id = %item.device(),
        error = &error as &dyn std::error::Error,
        "What a device said could not be stored and was dropped."
    );
    match item {
        Item::Report { report, ack } => ingest.queue().lost(&report, &ack),
        Item::Register { done, .. } => drop(done.send(Err(error))),
        Item::Heard { .. } => {}
    }
}

/// Answers the registrations of a committed group. A stream that has ended meanwhile needs none.
fn registered(group: Vec<Item>) {
    for item in group {
        if let Item::Register { done, .. } = item {
            drop(done.send(Ok(())));
        }
    }
}

/// One transaction for the whole group; the acknowledgements follow its commit.
async fn commit_once(db: &Db, sessions: &Sessions, group: &[Item]) -> Result<(), DbError> {
    let devices: BTreeSet<&DeviceId> = group.iter().map(Item::device).collect();
    let devices: Vec<DeviceId> = devices.into_iter().cloned().collect();
    let mut tx = db.begin().await?;
    let now = tx.now();
    let mut states = states::load(db, &mut On::Tx(&mut tx), &devices).await?;
    let places: HashMap<DeviceId, usize> = states
        .iter()
        .enumerate()
        .map(|(place, state)| (state.record.client_id.clone(), place))
        .collect();
    for item in group {
        // A device that was removed meanwhile has nothing to be changed.
        let Some(state) = places
            .get(item.device())
            .and_then(|place| states.get_mut(*place))
        else {
            continue;
        };
        match item {
            Item::Report { report, .. } => state.report(report, now),
            Item::Heard {
                rollout,
                generation,
                ..
            } => state.heard(rollout, *generation, now),
            Item::Register { done, .. } if done.is_closed() => {}
            Item::Register { facts, epoch, .. } => state.take_in(facts, *epoch, now),
        }
    }
    join::join(db, &mut tx, &mut states).await?;
    let acks = acks(group, &places, &states);
    let updated: Vec<_> = states.iter().filter_map(updated).collect();
    let saved = states::save(&mut tx, states).await?;
    tx.commit().await?;
    saved.nudge(db);
    for (device, product, version) in updated {
        sessions.announce_update(&device, &product, &version);
    }
    for (sink, acked) in acks {
        sink.send_modify(|held| {
            let upto_seq = held.map_or(acked.upto_seq, |held| held.upto_seq.max(acked.upto_seq));
            *held = Some(Acked {
                upto_seq,
                generation: acked.generation,
            });
        });
    }
    Ok(())
}

/// Who may be told about when the commit is done: device, product and new version.
fn updated(state: &DeviceState) -> Option<(DeviceId, Product, String)> {
    let (record, version) = (&state.record, state.updated_to.clone()?);
    Some((record.client_id.clone(), record.product.clone(), version))
}

/// What each stream of the group may forget.
fn acks(
    group: &[Item],
    places: &HashMap<DeviceId, usize>,
    states: &[DeviceState],
) -> Vec<(AckSink, Acked)> {
    let mut acks: BTreeMap<usize, (AckSink, Acked)> = BTreeMap::new();
    for item in group {
        let Item::Report { report, ack } = item else {
            continue;
        };
        let Some(state) = places
            .get(&report.device)
            .and_then(|place| states.get(*place))
        else {
            continue;
        };
        let acked = Acked {
            upto_seq: report.seq,
            generation: state.record.desired_generation,
        };
        let (_, held) = acks
            .entry(Arc::as_ptr(ack).addr())
            .or_insert_with(|| (Arc::clone(ack), acked));
        held.upto_seq = held.upto_seq.max(report.seq);
    }
    acks.into_values().collect()
}

/// Commits at once what the task would commit in its time.
#[cfg(test)]
pub(crate) mod testing {
    use tokio::sync::oneshot;

    use fwpush_keys::time::Timestamp;

    use super::{AckSink, Db, DbError, DeviceId, Item, Sessions};
    use crate::{desired::Facts, ingest::DeviceReport};

    async fn commit_once(db: &Db, group: &[Item]) -> Result<(), DbError> {
        super::commit_once(db, &Sessions::new(Timestamp::EPOCH), group).await
    }

    pub(crate) async fn report(
        db: &Db,
        report: DeviceReport,
        ack: &AckSink,
    ) -> Result<(), DbError> {
        commit_once(
            db,
            &[Item::Report {
                report: Box::new(report),
                ack: ack.clone(),
            }],
        )
        .await
    }

    pub(crate) async fn register(
        db: &Db,
        device: &DeviceId,
        facts: Facts,
        epoch: u64,
    ) -> Result<(), DbError> {
        let (done, _waits) = oneshot::channel();
        commit_once(
            db,
            &[Item::Register {
                device: device.clone(),
                facts: Box::new(facts),
                epoch,
                done,
            }],
        )
        .await
    }

    pub(crate) async fn heard(
        db: &Db,
        device: &DeviceId,
        rollout: &fwpush_keys::id::RolloutId,
        generation: u64,
    ) -> Result<(), DbError> {
        commit_once(
            db,
            &[Item::Heard {
                device: device.clone(),
                rollout: *rollout,
                generation,
            }],
        )
        .await
    }
}
