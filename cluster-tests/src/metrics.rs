//! Prometheus text, parsed as far as tests need it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail};

/// One line.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Name of the series, with `_bucket`, `_sum`, `_count` for histograms.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    /// In the order of the text.
    pub samples: Vec<Sample>,
    /// Names that have a `# TYPE` line, with the type.
    pub kinds: BTreeMap<String, String>,
}

impl Metrics {
    /// Reads the text exposition format, version 0.0.4.
    pub fn parse(text: &str) -> Result<Self> {
        let mut metrics = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            if let Some(comment) = line.strip_prefix('#') {
                let mut words = comment.split_whitespace();
                if words.next() == Some("TYPE")
                    && let (Some(name), Some(kind)) = (words.next(), words.next())
                {
                    metrics.kinds.insert(name.to_owned(), kind.to_owned());
                }
                continue;
            }
            metrics
                .samples
                .push(sample(line).with_context(|| format!("line {line:?}"))?);
        }
        Ok(metrics)
    }

    /// All series of a name.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| sample.name == name)
    }

    /// The first series of a name with this label.
    #[must_use]
    pub fn with_label(&self, name: &str, label: &str, value: &str) -> Option<f64> {
        self.all(name)
            .find(|sample| sample.labels.get(label).is_some_and(|found| found == value))
            .map(|sample| sample.value)
    }

    /// The value of a name, summed over its labels.
    #[must_use]
    pub fn sum(&self, name: &str) -> Option<f64> {
        let mut values = self.all(name).map(|sample| sample.value).peekable();
        values.peek()?;
        Some(values.sum())
    }

    /// Upper bounds of a histogram's buckets, as they stand in the text.
    #[must_use]
    pub fn buckets(&self, name: &str) -> BTreeSet<String> {
        self.all(&format!("{name}_bucket"))
            .filter_map(|sample| sample.labels.get("le").cloned())
            .collect()
    }

    /// Whether anything of this name was exported, a histogram too.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        let parts = [name.to_owned(), format!("{name}_count"), format!("{name}_bucket")];
        self.samples.iter().any(|sample| parts.contains(&sample.name))
    }
}

fn sample(line: &str) -> Result<Sample> {
    let (series, value) = match line.rfind('}') {
        Some(end) => line.split_at(end + 1),
        None => line.split_once(char::is_whitespace).context("no value")?,
    };
    let value = value.split_whitespace().next().context("no value")?;
    let (name, labels) = match series.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').context("no closing brace")?),
        None => (series, ""),
    };
    if name.is_empty() {
        bail!("no name");
    }
    Ok(Sample {
        name: name.trim().to_owned(),
        labels: parse_labels(labels)?,
        value: value.parse().context("no number")?,
    })
}

/// `a="x",b="y\"z"`.
fn parse_labels(mut rest: &str) -> Result<BTreeMap<String, String>> {
    let mut labels = BTreeMap::new();
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if rest.is_empty() {
            return Ok(labels);
        }
        let (name, quoted) = rest.split_once("=\"").context("no quoted value")?;
        let mut value = String::new();
        let mut escaped = false;
        let mut end = None;
        for (at, c) in quoted.char_indices() {
            match c {
                _ if escaped => {
                    value.push(if c == 'n' { '\n' } else { c });
                    escaped = false;
                }
                '\\' => escaped = true,
                '"' => {
                    end = Some(at);
                    break;
                }
                c => value.push(c),
            }
        }
        let end = end.context("no closing quote")?;
        labels.insert(name.trim().to_owned(), value);
        rest = &quoted[end + 1..];
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
# HELP hsm_requests_total Requests.
# TYPE hsm_requests_total counter
hsm_requests_total{endpoint="/encrypt",status="200"} 3
hsm_requests_total{endpoint="/decrypt",status="200"} 4 1700000000
hsm_raft_term 7
hsm_odd{a="x,}\"y\\",b=""} -1.5
hsm_wait_seconds_bucket{le="0.001"} 1
hsm_wait_seconds_bucket{le="+Inf"} 2
hsm_wait_seconds_count 2
"#;

    #[test]
    fn the_text_is_read_whole() {
        let metrics = Metrics::parse(TEXT).unwrap();
        assert_eq!(metrics.sum("hsm_requests_total"), Some(7.0));
        assert_eq!(
            metrics.with_label("hsm_requests_total", "endpoint", "/decrypt"),
            Some(4.0)
        );
        assert_eq!(metrics.sum("hsm_raft_term"), Some(7.0));
        assert_eq!(metrics.kinds["hsm_requests_total"], "counter");
        assert_eq!(metrics.all("hsm_odd").next().unwrap().labels["a"], "x,}\"y\\");
        assert_eq!(metrics.buckets("hsm_wait_seconds").len(), 2);
        assert!(metrics.has("hsm_wait_seconds") && !metrics.has("hsm_nothing"));
        assert_eq!(metrics.sum("hsm_nothing"), None);
    }

    #[test]
    fn what_is_no_sample_is_an_error() {
        for text in ["alone", "{a=\"b\"} 1", "x{a=b} 1", "x{a=\"b} 1", "x y"] {
            assert!(Metrics::parse(text).is_err(), "{text}");
        }
    }
}
