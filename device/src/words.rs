//! Words of somebody else.

/// Text fit for a terminal and a log: control characters are replaced, and it is cut at `limit` bytes.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    let text = &text[..text.floor_char_boundary(limit)];
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_others_cannot_drive_the_terminal() {
        assert_eq!(
            printable("a\u{1b}[2Jb\nc\rd", 100),
            "a\u{fffd}[2Jb\nc\u{fffd}d"
        );
        assert_eq!(printable("äöü", 3), "ä");
    }
}
