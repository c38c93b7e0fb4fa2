//! Metrics for whoever reaches the health listener, which asks nobody for a certificate: what is counted
//! by context or key is shown as its sum, of ratios the largest, of what is left the smallest.

use std::borrow::Cow;
use std::collections::HashMap;

/// The labels that are shown. A label that is added to a metric stays hidden until it is added here.
const SHOWN: [&str; 16] = [
    "code",
    "endpoint",
    "kind",
    "le",
    "listener",
    "op",
    "operation",
    "peer",
    "reason",
    "result",
    "role",
    "section",
    "slot",
    "state",
    "status",
    "version",
];

/// A line of the answer.
enum Line<'a> {
    Comment(&'a str),
    Sample { series: String, value: Cow<'a, str> },
}

/// Prometheus text without the labels that name a context or key; series that differ in nothing else are
/// added up.
#[must_use]
pub fn without_names(text: &str) -> String {
    let mut lines = Vec::new();
    let mut places: HashMap<String, usize> = HashMap::new();
    for line in text.lines() {
        if line.is_empty() || line.starts_with('#') {
            lines.push(Line::Comment(line));
            continue;
        }
        // What cannot be read cannot be said to name nothing.
        let Some((series, value)) = sample(line) else {
            continue;
        };
        match places.get(&series).and_then(|place| lines.get_mut(*place)) {
            Some(Line::Sample { value: sum, .. }) => *sum = Cow::Owned(join(&series, sum, value)),
            _ => {
                places.insert(series.clone(), lines.len());
                let value = Cow::Borrowed(value);
                lines.push(Line::Sample { series, value });
            }
        }
    }
    let mut out = String::with_capacity(text.len());
    for line in lines {
        match line {
            Line::Comment(text) => out.push_str(text),
            Line::Sample { series, value } => {
                out.push_str(&series);
                out.push(' ');
                out.push_str(&value);
            }
        }
        out.push('\n');
    }
    out
}

/// Two values of one series. Ratios of different things have no sum, and who has nothing left is not helped by what
/// others have.
fn join(series: &str, known: &str, value: &str) -> String {
    let number = |text: &str| text.parse().unwrap_or(f64::NAN);
    let name = series.split_once('{').map_or(series, |(name, _)| name);
    let joined = if name.ends_with("_ratio") {
        number(known).max(number(value))
    } else if name.ends_with("_left") {
        number(known).min(number(value))
    } else {
        number(known) + number(value)
    };
    joined.to_string()
}

/// The series of a line, with the labels that are shown, and its value.
fn sample(line: &str) -> Option<(String, &str)> {
    let Some((name, mut rest)) = line.split_once('{') else {
        let (name, value) = line.split_once(' ')?;
        return Some((name.to_owned(), value));
    };
    let mut shown = Vec::new();
    let value = loop {
        let (label, text, after) = next_label(rest)?;
        if SHOWN.contains(&label) {
            shown.push(format!("{label}=\"{text}\""));
        }
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => break after.strip_prefix("} ")?,
        }
    };
    let series = if shown.is_empty() {
        name.to_owned()
    } else {
        format!("{name}{{{}}}", shown.join(","))
    };
    Some((series, value))
}

/// A label, its text as it stands, and what follows its closing quote.
fn next_label(rest: &str) -> Option<(&str, &str, &str)> {
    let (label, rest) = rest.split_once("=\"")?;
    let mut escaped = false;
    let end = rest.find(|c: char| {
        let ends = c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
        ends
    })?;
    Some((label, rest.get(..end)?, rest.get(end + 1..)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_added_up() {
        let text = "# HELP x_total Help.\n\
                    # TYPE x_total counter\n\
                    x_total{context=\"exchange-key\",status=\"success\"} 2\n\
                    x_total{context=\"2fa\",status=\"success\"} 40\n\
                    x_total{context=\"2fa\",status=\"error\"} 1\n\
                    \n\
                    y{key_id=\"kek-2fa-v1\"} 0.5\n\
                    y{key_id=\"kek-2fa-v2\"} 0.25\n";
        let shown = "# HELP x_total Help.\n\
                     # TYPE x_total counter\n\
                     x_total{status=\"success\"} 42\n\
                     x_total{status=\"error\"} 1\n\
                     \n\
                     y 0.75\n";
        assert_eq!(without_names(text), shown);
    }

    #[test]
    fn of_ratios_the_largest_is_shown() {
        let text = "r_ratio{context=\"2fa\"} 0.25\n\
                    r_ratio{context=\"exchange-key\"} 0.75\n\
                    r_ratio{context=\"order-key\"} 0.5\n";
        assert_eq!(without_names(text), "r_ratio 0.75\n");
    }

    #[test]
    fn of_what_is_left_the_smallest_is_shown() {
        let text = "x_left{context=\"2fa\"} 70\n\
                    x_left{context=\"exchange-key\"} 0\n\
                    x_left{context=\"order-key\"} 5\n";
        assert_eq!(without_names(text), "x_left 0\n");
    }

    #[test]
    fn everything_else_stands_as_it_was() {
        let text = "# TYPE d histogram\n\
                    d_bucket{slot=\"a\",op=\"encrypt\",le=\"0.00005\"} 1\n\
                    d_bucket{slot=\"a\",op=\"encrypt\",le=\"+Inf\"} 3\n\
                    d_sum{slot=\"a\",op=\"encrypt\"} 0.000021\n\
                    hsm_raft_quorum_ack_age_seconds -1\n\
                    hsm_raft_peer_lag{peer=\"odd\\\"},{name\\\\\"} 0\n";
        assert_eq!(without_names(text), text);
    }

    #[test]
    fn a_text_that_looks_like_syntax_ends_where_it_ends() {
        let line = "x{context=\"a\\\",slot=\\\"b\",slot=\"c\"} 1";
        assert_eq!(without_names(line), "x{slot=\"c\"} 1\n");
        let open = "x{context=\"a} 1";
        assert_eq!(without_names(open), "");
    }
}
