//! What a command prints: tables and sentences for people, one JSON document for programs.
//!
//! Data goes to stdout, everything else to stderr. Names, versions and messages come from devices, servers and files that
//! others wrote; every one is made harmless before it reaches a terminal.

use std::{
    borrow::Cow,
    io::{self, IsTerminal as _, Write as _},
};

use fwpush_keys::time::Timestamp;
use serde_json::Value;

use crate::{
    failure::{Doing as _, Result},
    progress,
};

/// Where a command's data goes, and in which form.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub json: bool,
}

impl Output {
    /// Prints data: `json` as one line with `--json`, else the text that `text` makes.
    /// A reader that went away (`| head`) is no error.
    pub fn data(&self, json: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> Result<()> {
        let text = if self.json {
            json_line(&json())
        } else {
            escape_lines(&text())
        };
        print(&text)
    }

    /// Says something to the person: on stderr, so that stdout stays data.
    pub fn say(&self, words: &str) {
        // Nowhere to tell that telling failed.
        let _ = progress::write_line(&escape_lines(words));
    }
}

/// One line of JSON that no terminal reads as a command.
pub fn json_line(value: &Value) -> String {
    let text = value.to_string();
    if !text.chars().any(steers_terminal) {
        return text;
    }
    // Control characters can only stand inside strings, where \u escapes mean the same.
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers_terminal(c) {
            for unit in c.encode_utf16(&mut [0; 2]) {
                safe.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            safe.push(c);
        }
    }
    safe
}

fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| {
            if text.ends_with('\n') {
                Ok(())
            } else {
                stdout.write_all(b"\n")
            }
        })
        .and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.doing(|| "write to standard output".to_owned()),
    }
}

/// Whether a person is there to be asked.
pub fn can_ask() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a yes/no question on stderr; anything but `y` or `yes` is no.
pub fn ask(question: &str) -> Result<bool> {
    let mut stderr = io::stderr();
    write!(stderr, "{} [y/N] ", escape_lines(question))
        .and_then(|()| stderr.flush())
        .doing(|| "ask on the terminal".to_owned())?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .doing(|| "read the answer".to_owned())?;
    Ok(matches!(
        answer.trim().to_ascii_lowercase().as_str(),
        "y" | "yes"
    ))
}

/// True for characters that move the cursor, change colours or reorder text: C0, DEL, C1, line separators, bidirectional
/// controls, zero-width characters and tags.
fn steers_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// Text that prints as itself, with everything else as an escape (`\n`, `\u{1b}`).
pub fn escape(text: &str) -> Cow<'_, str> {
    if !text.chars().any(steers_terminal) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if steers_terminal(c) {
            safe.extend(c.escape_default())
        } else {
            safe.push(c)
        }
    }
    Cow::Owned(safe)
}

/// Like [`escape`], but keeps line ends: for texts that this program composed of escaped parts.
pub fn escape_lines(text: &str) -> String {
    text.split('\n').map(escape).collect::<Vec<_>>().join("\n")
}

/// A table in plain columns, two spaces apart, with a heading; every cell is escaped.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new<const N: usize>(heading: [&str; N]) -> Self {
        Self {
            rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()],
        }
    }

    pub fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows
            .push(cells.iter().map(|cell| escape(cell).into_owned()).collect());
    }

    /// The table, or `none` when it has no rows.
    pub fn or(self, none: &str) -> String {
        if self.rows.len() == 1 {
            return format!("{none}\n");
        }
        let columns = self.rows[0].len();
        let width = |column: usize| {
            self.rows
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let line: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:<width$}"))
                .collect();
            text.push_str(line.join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// `name: value` lines with the values in one column.
#[derive(Debug, Default)]
pub struct Facts {
    lines: Vec<(String, String)>,
}

impl Facts {
    pub fn add(&mut self, name: &str, value: impl AsRef<str>) -> &mut Self {
        self.lines
            .push((name.to_owned(), escape(value.as_ref()).into_owned()));
        self
    }

    /// Adds the line unless the value is empty.
    pub fn add_some(&mut self, name: &str, value: impl AsRef<str>) -> &mut Self {
        if value.as_ref().is_empty() {
            self
        } else {
            self.add(name, value)
        }
    }

    pub fn text(&self) -> String {
        let width = self
            .lines
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0)
            + 2;
        self.lines
            .iter()
            .fold(String::new(), |text, (name, value)| {
                let name = format!("{name}:");
                text + &format!("{name:<width$}{value}\n")
            })
    }
}

/// Bytes for people, in binary units.
pub fn bytes(count: u64) -> String {
    indicatif::BinaryBytes(count).to_string()
}

/// A time for people; `-` for none (0 on the wire).
pub fn time(at_ms: i64) -> String {
    if at_ms == 0 {
        "-".to_owned()
    } else {
        Timestamp::from_ms(at_ms - at_ms % 1_000).to_string()
    }
}

/// A time for programs; null for none (0 on the wire).
pub fn json_time(at_ms: i64) -> Value {
    if at_ms == 0 {
        Value::Null
    } else {
        Value::String(Timestamp::from_ms(at_ms).to_string())
    }
}

/// A time and what it means from now, in words.
pub fn time_and_distance(at: Timestamp, now: Timestamp) -> String {
    let seconds = at.as_ms().saturating_sub(now.as_ms()) / 1_000;
    let (amount, unit) = match seconds.unsigned_abs() {
        s if s < 120 => (s, "s"),
        s if s < 7_200 => (s / 60, "min"),
        s if s < 172_800 => (s / 3_600, "h"),
        s => (s / 86_400, "days"),
    };
    if seconds >= 0 {
        format!("{at} (in {amount} {unit})")
    } else {
        format!("{at} ({amount} {unit} ago)")
    }
}

/// `1 device`, `2 devices`.
pub fn plural(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTILE: &str = "a\u{1b}[31m\n\u{202e}b\u{9b}2J\u{7f}";

    #[test]
    fn a_table_shows_hostile_names_as_escapes() {
        let mut table = Table::new(["ID", "NAME"]);
        table.row(["1".into(), HOSTILE.into()]);
        let text = table.or("none");
        assert_eq!(text.lines().count(), 2);
        assert!(
            text.chars().all(|c| c == '\n' || !steers_terminal(c)),
            "{text:?}"
        );
        assert!(
            text.contains("\\u{1b}[31m\\n\\u{202e}b\\u{9b}2J\\u{7f}"),
            "{text:?}"
        );
    }

    #[test]
    fn json_with_hostile_names_reads_back_the_same() {
        let value = serde_json::json!({ "name": HOSTILE, "more": "\u{e0001}" });
        let line = json_line(&value);
        assert!(!line.chars().any(steers_terminal), "{line:?}");
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
    }

    #[test]
    fn an_empty_table_says_so() {
        assert_eq!(Table::new(["ID"]).or("no devices"), "no devices\n");
    }

    #[test]
    fn facts_align() {
        let mut facts = Facts::default();
        facts.add("a", "1").add("long", "2").add_some("none", "");
        assert_eq!(facts.text(), "a:    1\nlong: 2\n");
    }
}
