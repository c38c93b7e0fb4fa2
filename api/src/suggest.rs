//! "Did you mean": the nearest of a list of known words, for the files that people write. Only for messages; nothing is
//! ever accepted because it is similar.

/// The known word nearest to `typed`, if near enough to be a slip of the fingers: at most a
/// third of the word wrong, and never more than three edits.
#[must_use]
pub fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed: Vec<char> = simplified(typed).take(MAX_COMPARED).collect();
    known
        .into_iter()
        .map(|word| {
            let chars: Vec<char> = simplified(word).take(MAX_COMPARED).collect();
            (distance(&typed, &chars), chars.len().max(typed.len()), word)
        })
        .filter(|(edits, length, _)| *edits <= 3 && *edits * 3 <= (*length).max(3))
        .min_by_key(|(edits, _, _)| *edits)
        .map(|(_, _, word)| word)
}

/// A misspelt key may be as long as its author likes; comparing costs its length squared.
const MAX_COMPARED: usize = 64;

/// `pinEnv`, `pin-env` and `PIN_ENV` are all near `pin_env`.
fn simplified(word: &str) -> impl Iterator<Item = char> + '_ {
    word.chars()
        .filter(|c| !matches!(c, '_' | '-' | ' '))
        .flat_map(char::to_lowercase)
}

/// Optimal string alignment distance: insertions, deletions, replacements, neighbours swapped.
fn distance(a: &[char], b: &[char]) -> usize {
    let width = b.len() + 1;
    let mut rows = vec![0_usize; (a.len() + 1) * width];
    let at = |row: usize, column: usize| row * width + column;
    for (column, cell) in rows.iter_mut().take(width).enumerate() {
        *cell = column;
    }
    for row in 1..=a.len() {
        rows[at(row, 0)] = row;
        for column in 1..=b.len() {
            let replaced = rows[at(row - 1, column - 1)] + usize::from(a[row - 1] != b[column - 1]);
            let mut best = replaced
                .min(rows[at(row - 1, column)] + 1)
                .min(rows[at(row, column - 1)] + 1);
            let swapped = row > 1 && column > 1 && a[row - 1] == b[column - 2] && a[row - 2] == b[column - 1];
            if swapped {
                best = best.min(rows[at(row - 2, column - 2)] + 1);
            }
            rows[at(row, column)] = best;
        }
    }
    rows[at(a.len(), b.len())]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const KNOWN: [&str; 5] = ["listen", "pin_env", "pin_file", "contexts", "heartbeat_ms"];

    #[test]
    fn slips_of_the_fingers_are_recognised() {
        for (typed, meant) in [
            ("listne", "listen"),
            ("pinenv", "pin_env"),
            ("pinEnv", "pin_env"),
            ("pin-file", "pin_file"),
            ("context", "contexts"),
            ("hartbeat_ms", "heartbeat_ms"),
        ] {
            assert_eq!(nearest(typed, KNOWN), Some(meant), "{typed}");
        }
    }

    #[test]
    fn something_else_altogether_gets_no_suggestion() {
        for typed in ["database", "x", "", "replication"] {
            assert_eq!(nearest(typed, KNOWN), None, "{typed}");
        }
    }

    #[test]
    fn a_very_long_key_costs_no_more_than_a_long_one() {
        assert_eq!(nearest(&"a".repeat(1_000_000), KNOWN), None);
    }
}
