//! What happened in an update, in lines for people: goes to the server with the report of one that went wrong.

use std::collections::VecDeque;

use fwpush_keys::time::Timestamp;
use serde::{Deserialize, Serialize};

use crate::limits;

/// The last [`limits::JOURNAL_LINES`] things that happened in the present update, or in the last one. Saved with the state
/// whenever that is saved; a line is no reason to write.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    lines: VecDeque<Line>,
    /// Older ones that are gone.
    dropped: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Line {
    at: Timestamp,
    text: String,
    /// How often the same was said in a row.
    times: u32,
}

impl Journal {
    /// Begins anew, for another update.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Adds a line, cut at [`limits::JOURNAL_LINE_BYTES`]; the same again only counts.
    pub(crate) fn note(&mut self, at: Timestamp, mut text: String) {
        text.truncate(text.floor_char_boundary(limits::JOURNAL_LINE_BYTES));
        let text = text.replace('\n', " | ");
        match self.lines.back_mut() {
            Some(last) if last.text == text => last.times = last.times.saturating_add(1),
            _ => self.lines.push_back(Line { at, text, times: 1 }),
        }
        while self.lines.len() > limits::JOURNAL_LINES {
            self.drop_first();
        }
    }

    fn drop_first(&mut self) {
        self.lines.pop_front();
        self.dropped = self.dropped.saturating_add(1);
    }

    /// The newest lines, oldest first; at most [`limits::JOURNAL_BYTES`].
    pub fn text(&self) -> String {
        let mut shown = self.clone();
        loop {
            let text = shown.whole();
            if text.len() <= limits::JOURNAL_BYTES || shown.lines.is_empty() {
                return text;
            }
            shown.drop_first();
        }
    }

    fn whole(&self) -> String {
        let mut text = match self.dropped {
            0 => String::new(),
            dropped => format!("({dropped} earlier lines)\n"),
        };
        for Line {
            at,
            text: line,
            times,
        } in &self.lines
        {
            text.push_str(&format!("{at} {line}"));
            if *times > 1 {
                text.push_str(&format!(" ({times} times)"));
            }
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const START: Timestamp = Timestamp::from_ms(1_793_491_200_000);

    #[test]
    fn lines_stand_in_order_with_their_times_and_repeats_are_counted() {
        let mut journal = Journal::default();
        journal.note(START, "accepted".into());
        for wait in 1..4 {
            let later = START.saturating_add(Duration::from_secs(wait));
            journal.note(later, "not connected: refused\nby the other side".into());
        }
        assert_eq!(
            journal.text(),
            "2026-11-01T00:00:00Z accepted\n\
             2026-11-01T00:00:01Z not connected: refused | by the other side (3 times)\n"
        );
        journal.clear();
        assert_eq!(journal.text(), "");
    }

    #[test]
    fn however_much_is_noted_the_newest_stays_within_the_bounds() {
        let mut journal = Journal::default();
        for line in 0..1_000 {
            journal.note(START, format!("{line} {}", "ü".repeat(line)));
        }
        assert!(journal.lines.len() <= limits::JOURNAL_LINES);
        let text = journal.text();
        assert!(text.len() <= limits::JOURNAL_BYTES, "{}", text.len());
        assert!(text.contains("Z 999 ü"), "{text}");
        let shown = text.lines().count() - 1;
        assert!(
            text.starts_with(&format!("({} earlier lines)\n", 1_000 - shown)),
            "{text}"
        );
    }
}
