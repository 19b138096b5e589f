//! A transfer that is ended: by an order, or by a bug.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use fwpush_proto::v1::{self, FileNotice, client_message::Kind as FromDevice};

use super::bench::*;
use crate::{AgentEvent, BootView, ImageFacts, Phase, SlotError, SlotId, Slots};

/// Slots on a medium that behaves in its own way when it is written.
#[derive(Clone)]
struct Medium {
    slots: MemorySlots,
    blocks: bool,
    on_write: Arc<dyn Fn(u64) + Send + Sync>,
}

impl fmt::Debug for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Medium")
    }
}

impl Slots for Medium {
    fn blocks(&self) -> bool {
        self.blocks
    }

    fn view(&mut self) -> Result<BootView, SlotError> {
        self.slots.view()
    }

    fn spare_capacity(&mut self) -> Result<u64, SlotError> {
        self.slots.spare_capacity()
    }

    fn path(&self, slot: SlotId) -> Option<PathBuf> {
        self.slots.path(slot)
    }

    fn invalidate_spare(&mut self) -> Result<(), SlotError> {
        self.slots.invalidate_spare()
    }

    fn read(&mut self, slot: SlotId, offset: u64, buffer: &mut [u8]) -> Result<(), SlotError> {
        self.slots.read(slot, offset, buffer)
    }

    fn write_spare(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SlotError> {
        (self.on_write)(offset);
        self.slots.write_spare(offset, bytes)
    }

    fn sync_spare(&mut self) -> Result<(), SlotError> {
        self.slots.sync_spare()
    }

    fn forget_cached_spare(&mut self) -> Result<(), SlotError> {
        self.slots.forget_cached_spare()
    }

    fn mark_trial(&mut self, image: &ImageFacts, tries: u8) -> Result<(), SlotError> {
        self.slots.mark_trial(image, tries)
    }

    fn confirm_running(&mut self, floor: u64) -> Result<(), SlotError> {
        self.slots.confirm_running(floor)
    }

    fn reject_running(&mut self) -> Result<(), SlotError> {
        self.slots.reject_running()
    }
}

fn hold(server: &Server, generation: u64) {
    server.books.lock().unwrap().generation = generation;
    server.notice.send_replace(Some(FileNotice {
        generation,
        action: v1::Action::Hold.into(),
        ..Default::default()
    }));
}

fn answered(bench: &Bench, generation: u64) -> bool {
    bench.heard().iter().any(
        |kind| matches!(kind, FromDevice::NoticeReply(reply) if reply.generation == generation),
    )
}

#[test]
fn nothing_is_written_after_an_order_to_stop_was_answered() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (bench, at_answer) = runtime.block_on(hold_while_it_writes());
    // Waits for everything that still runs on another thread.
    drop(runtime);
    // Not even the batch of eight groups that the order came into was written to its end.
    assert!((2..9).contains(&at_answer), "{at_answer} writes");
    assert_eq!(bench.writes().len(), at_answer);
}

/// The bench, and how many groups were written when the server had the answer.
async fn hold_while_it_writes() -> (Bench, usize) {
    let bench = Bench::new();
    bench.release(1, "1.1.0", &image(16, 0));
    let server = Arc::clone(&bench.server);
    let medium = Medium {
        slots: bench.slots.clone(),
        blocks: true,
        // Slow flash: the order comes while a group is being written and others wait for it.
        on_write: Arc::new(move |offset| {
            if offset == GROUP as u64 {
                hold(&server, 2);
            }
            std::thread::sleep(Duration::from_millis(100));
        }),
    };
    let over =
        |event: &AgentEvent| matches!(event, AgentEvent::Acked { .. }) && answered(&bench, 2);
    let at_answer = async {
        while !answered(&bench, 2) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        bench.writes().len()
    };
    let (at_answer, _) = tokio::join!(at_answer, bench.run_on(medium, over));
    (bench, at_answer)
}

#[tokio::test]
async fn a_bug_in_a_job_is_a_failure_and_not_a_hang() {
    for blocks in [false, true] {
        let bench = Bench::new();
        bench.release(1, "1.1.0", &image(4, 0));
        let medium = Medium {
            slots: bench.slots.clone(),
            blocks,
            on_write: Arc::new(|offset| assert!(offset == 0, "a bug on purpose")),
        };
        let over = |event: &AgentEvent| matches!(event, AgentEvent::Phase { phase, .. } if phase.is_terminal());
        let (_, events) = bench.run_on(medium, over).await;
        let Some(AgentEvent::Phase {
            phase: Phase::Failed,
            failure: Some(failure),
            ..
        }) = events.last()
        else {
            panic!("{events:?}")
        };
        assert_eq!(failure.code, "INTERNAL");
        assert!(failure.message.contains("a bug on purpose"), "{failure}");
    }
}
