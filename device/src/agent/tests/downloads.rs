//! A source that breaks, lies or is busy.

use super::bench::*;
use crate::{AgentEvent, Exit, Failure, Phase, SlotId};
use tonic::Code;

fn ended(event: &AgentEvent) -> bool {
    matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal() || *phase == Phase::Deferred)
}

async fn end_of(bench: &Bench) -> (Phase, Option<Failure>, Vec<AgentEvent>) {
    let (_, events) = bench.run_until(ended).await;
    let Some(AgentEvent::Phase { phase, failure, .. }) = events
        .iter()
        .rfind(|event| matches!(event, AgentEvent::Phase { .. }))
    else {
        panic!("{events:?}");
    };
    (*phase, failure.clone(), events)
}

#[tokio::test]
async fn a_download_goes_on_where_it_was_cut() {
    let bench = Bench::new();
    let image = image(12, 77);
    bench.release(1, "1.1.0", &image);
    bench.faults(&[
        Fault::CutAfter(150_000),
        Fault::BreakAfter(150_000),
        Fault::CutAfter(0),
        Fault::CutAfter(70_000),
    ]);
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
    assert_eq!(bench.slots.content(SlotId::B, image.len()), image);
    assert_eq!(
        bench.store.groups_written(),
        13,
        "no group was written twice"
    );
    let mut writes = bench.writes();
    writes.dedup();
    assert_eq!(writes.len(), 13);
}

#[tokio::test]
async fn a_flipped_bit_in_the_stored_file_is_found_within_its_group_and_named() {
    let bench = Bench::new();
    let image = image(6, 0);
    bench.release(1, "1.1.0", &image);
    let at = 3 * GROUP + 12_345;
    bench.stuck_fault(Fault::Flip(at as u64));
    let (phase, failure, events) = end_of(&bench).await;
    let failure = failure.unwrap();
    assert_eq!(
        (phase, failure.code.as_str()),
        (Phase::Failed, "GROUP_MISMATCH")
    );
    let range = format!("group 3 (bytes {} to {})", 3 * GROUP, 4 * GROUP);
    assert!(failure.message.contains(&range), "{}", failure.message);
    assert!(
        events
            .iter()
            .any(|event| matches!(event, AgentEvent::GroupRefused { index: 3, .. }))
    );
    // Nothing of it, and nothing after it in the stream, is in the slot.
    assert_eq!(bench.writes(), [0, GROUP as u64, 2 * GROUP as u64]);
    assert_eq!(
        bench.slots.content(SlotId::B, 4 * GROUP)[3 * GROUP..],
        vec![0xbb; GROUP]
    );
}

#[tokio::test]
async fn a_bit_flipped_on_the_wire_is_fetched_again() {
    let bench = Bench::new();
    let image = image(6, 0);
    bench.release(1, "1.1.0", &image);
    bench.faults(&[
        Fault::Flip(70_000),
        Fault::Flip(70_001),
        Fault::Flip(5 * GROUP as u64),
    ]);
    let (exit, events) = bench.run_until(ended).await;
    assert_eq!(exit, Some(Exit::RebootDue));
    assert_eq!(bench.slots.content(SlotId::B, image.len()), image);
    let refused = events
        .iter()
        .filter(|event| matches!(event, AgentEvent::GroupRefused { .. }))
        .count();
    assert_eq!((refused, bench.store.groups_written()), (3, 6));
}

#[tokio::test]
async fn an_outline_that_does_not_lead_to_the_signed_root_is_not_used() {
    for fault in [Fault::FlipOutline, Fault::ShortOutline] {
        let bench = Bench::new();
        bench.release(1, "1.1.0", &image(6, 0));
        bench.stuck_fault(fault);
        let (phase, failure, _) = end_of(&bench).await;
        let code = failure.unwrap().code;
        assert!(bench.writes().is_empty());
        match fault {
            Fault::FlipOutline => {
                assert_eq!((phase, code.as_str()), (Phase::Failed, "OUTLINE_MISMATCH"))
            }
            _ => assert_eq!((phase, code.as_str()), (Phase::Deferred, "FILE_STREAM")),
        }
    }
}

#[tokio::test]
async fn a_server_that_sends_other_bytes_than_asked_for_is_given_up() {
    for fault in [Fault::WrongOffset, Fault::LastTooSoon, Fault::EmptyChunks] {
        let bench = Bench::new();
        bench.release(1, "1.1.0", &image(6, 0));
        bench.stuck_fault(fault);
        let (phase, failure, _) = end_of(&bench).await;
        assert_eq!(
            (phase, failure.unwrap().code.as_str()),
            (Phase::Deferred, "FILE_STREAM"),
            "{fault:?}"
        );
        assert!(bench.writes().is_empty());
    }
}

#[tokio::test]
async fn what_a_server_sends_past_the_end_is_not_written() {
    let bench = Bench::new();
    let image = image(6, 0);
    bench.release(1, "1.1.0", &image);
    bench.faults(&[Fault::Endless]);
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
    assert_eq!(bench.slots.content(SlotId::B, image.len()), image);
    assert!(
        bench
            .writes()
            .iter()
            .all(|offset| *offset < image.len() as u64)
    );
}

#[tokio::test]
async fn a_busy_server_is_asked_again_when_it_said() {
    let bench = Bench::new();
    bench.release(1, "1.1.0", &image(2, 0));
    bench.faults(&[
        Fault::Busy(1),
        Fault::Busy(1),
        Fault::Busy(1),
        Fault::Busy(1),
        Fault::Busy(1),
    ]);
    assert_eq!(bench.run_until(ended).await.0, Some(Exit::RebootDue));
}

#[tokio::test]
async fn a_refused_download_ends_with_the_servers_reason() {
    let cases = [
        (Code::NotFound, Phase::Deferred, "FILE_NOT_FOUND"),
        (Code::DataLoss, Phase::Deferred, "FILE_DAMAGED"),
        (Code::PermissionDenied, Phase::Failed, "FILE_DENIED"),
        (Code::FailedPrecondition, Phase::Failed, "FILE_REVOKED"),
    ];
    for (code, phase, word) in cases {
        let bench = Bench::new();
        bench.release(1, "1.1.0", &image(2, 0));
        bench.stuck_fault(Fault::Refuse(code));
        let (ended, failure, _) = end_of(&bench).await;
        let failure = failure.unwrap();
        assert_eq!((ended, failure.code.as_str()), (phase, word));
        assert!(failure.message.contains("because"), "{}", failure.message);
    }
}
