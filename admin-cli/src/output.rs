//! What the program says: results to standard output as a table, JSON or YAML, everything else to standard
//! error, so that a pipe gets the result and nothing but the result.

use std::fmt;
use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};
use clap::ValueEnum;
use comfy_table::Table;
use hsm_api::client::Answer;
use serde::Serialize;
use zeroize::Zeroizing;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For programs, and for people who like it better.
    Yaml,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Table => "table",
            Self::Json => "json",
            Self::Yaml => "yaml",
        })
    }
}

/// A line to standard error. Nothing depends on its arrival.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Writes a result: as JSON or YAML, or as the text `table` makes of it.
pub(crate) fn print(format: Format, value: &impl Serialize, table: impl FnOnce() -> String) -> Result<()> {
    let mut text = match format {
        Format::Json => serde_json::to_string_pretty(value).context("encode the answer")?,
        Format::Yaml => yaml(value)?,
        Format::Table => table(),
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    bytes(text.as_bytes())
}

/// The answer to a change, for programs with an index from which on it is in every state: whoever asks any node for
/// at least that one (`--min-index`) reads what was written.
#[derive(Serialize)]
struct Change<'a, T> {
    #[serde(flatten)]
    answer: &'a T,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
}

/// As [`print`], of a change.
pub(crate) fn print_change<T: Serialize>(
    format: Format,
    answer: &Answer<T>,
    table: impl FnOnce() -> String,
) -> Result<()> {
    let change = Change {
        answer: &answer.body,
        index: answer.meta.index.map(|index| index.to_string()),
    };
    print(format, &change, table)
}

/// YAML in which every text is on one line: a ciphertext is found by its name with grep, too.
pub(crate) fn yaml(value: &impl Serialize) -> Result<String> {
    let options = serde_saphyr::ser_options! { prefer_block_scalars: false };
    serde_saphyr::to_string_with_options(value, options).context("encode the answer")
}

/// Writes JSON that holds a secret: the buffer is wiped and never grows. It is YAML as well, whose own writer would
/// leave copies behind.
pub(crate) fn secret_json(value: &impl Serialize, size: usize) -> Result<()> {
    let mut text = Zeroizing::new(Vec::<u8>::with_capacity(size));
    serde_json::to_writer_pretty(&mut *text, value).context("encode the answer")?;
    text.push(b'\n');
    bytes(&text)
}

/// Writes bytes as they are. A reader that went away is no error: it has read what it wanted.
pub(crate) fn bytes(content: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(content).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome.context("write to standard output"),
    }
}

/// Columns without lines, for people and for awk.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(header.map(str::to_owned).to_vec());
    for row in rows {
        table.add_row(row.to_vec());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Names and values, one pair a line.
pub(crate) fn pairs<const N: usize>(pairs: [(&str, String); N]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    pairs
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}\n"))
        .collect()
}

/// `-` for what is absent.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_header_and_columns_that_line_up() {
        let text = table(
            ["NODE", "ROLE"],
            [
                ["hsm-node-1".to_owned(), "leader".to_owned()],
                ["b".to_owned(), "-".to_owned()],
            ],
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(
            lines[0].starts_with("NODE") && lines[1].starts_with("hsm-node-1  leader"),
            "{text}"
        );
        assert_eq!(lines[0].find("ROLE"), lines[1].find("leader"), "{text}");
    }

    #[test]
    fn pairs_line_up() {
        assert_eq!(
            pairs([("a", "1".to_owned()), ("long", "2".to_owned())]),
            "a     1\nlong  2\n"
        );
    }

    #[test]
    fn yaml_reads_back_and_keeps_each_text_on_its_line() {
        let long = "A".repeat(200);
        let value = serde_json::json!({
            "ciphertext": long, "key_version": 3, "active": null, "ready": true, "label": "on",
            "slots": [{"slot": "2fa", "reason": "first line\nsecond: line"}], "acks": []
        });
        let text = yaml(&value).unwrap();
        let read: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(read, value, "{text}");
        assert!(
            text.lines().any(|line| line == format!("ciphertext: {long}")),
            "{text}"
        );
    }

    #[test]
    fn a_change_is_printed_with_its_index_beside_its_members() {
        let change = Change {
            answer: &serde_json::json!({"context": "2fa", "version": 2}),
            index: Some("1.42".to_owned()),
        };
        let expected = serde_json::json!({"context": "2fa", "version": 2, "index": "1.42"});
        assert_eq!(serde_json::to_value(&change).unwrap(), expected);
        let text = yaml(&change).unwrap();
        let read: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(read["index"], "1.42", "{text}");
    }

    #[test]
    fn what_is_absent_is_a_dash() {
        assert_eq!(or_dash(None::<u32>), "-");
        assert_eq!(or_dash(Some(7)), "7");
    }
}
