//! The alerts of `config-examples/prometheus/`, read as far as tests need it: what each asks of a node. What they mean
//! is tested by promtool (`scripts/test.sh alerts`), which knows nothing of the metrics that nodes export.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// Labels that Prometheus and its configuration give to every series.
const GIVEN: [&str; 3] = ["job", "cluster", "instance"];

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alert {
    /// `HsmNoLeader`.
    pub name: String,
    /// The expression, in one line.
    pub expr: String,
    /// The section of the documentation that says what to do.
    pub runbook: String,
}

/// What an expression asks for: `hsm_slot_state{state="ready"}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selector {
    /// Of the series.
    pub name: String,
    /// The labels that are asked for, each with its values.
    pub labels: Vec<(String, Vec<String>)>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../config-examples/prometheus")
}

/// The alerts that are shipped; at least one.
pub fn shipped() -> Result<Vec<Alert>> {
    let path = folder().join("alerts.yaml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    read(&text)
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// The alerts of a file that is written as ours is: each begins with its name, expressions and links are as they stand
/// or indented below their key.
fn read(text: &str) -> Result<Vec<Alert>> {
    let mut alerts: Vec<Alert> = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some((key, value)) = line.trim_start().trim_start_matches("- ").split_once(':') else {
            continue;
        };
        let mut value = value.trim().to_owned();
        if matches!(value.as_str(), "|-" | ">-") {
            value.clear();
            while let Some(below) = lines.next_if(|below| indent(below) > indent(line)) {
                value.push_str(below.trim());
                value.push(' ');
            }
        }
        if key == "alert" {
            alerts.push(Alert {
                name: value,
                expr: String::new(),
                runbook: String::new(),
            });
        } else if let Some(alert) = alerts.last_mut() {
            match key {
                "expr" => alert.expr = value,
                "runbook" => alert.runbook = value,
                _ => {}
            }
        }
    }
    ensure!(!alerts.is_empty(), "there is no alert");
    for alert in &alerts {
        let whole = !alert.expr.is_empty() && !alert.runbook.is_empty();
        ensure!(whole, "{}: no expression or no runbook: {alert:?}", alert.name);
    }
    Ok(alerts)
}

impl Alert {
    /// What it asks nodes for, each as often as it does.
    pub fn selectors(&self) -> Result<Vec<Selector>> {
        let mut found = Vec::new();
        let mut rest = self.expr.as_str();
        while let Some(at) = rest.find("hsm_") {
            let after = &rest[at..];
            let end = after
                .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .unwrap_or(after.len());
            let (name, after) = after.split_at(end);
            rest = after;
            let mut labels = Vec::new();
            if let Some(asked) = after.strip_prefix('{') {
                let (asked, after) = asked.split_once('}').context("no closing brace")?;
                for one in asked.split(',') {
                    labels.push(matcher(one).with_context(|| format!("{}: {one}", self.name))?);
                }
                rest = after;
            }
            found.push(Selector {
                name: name.to_owned(),
                labels,
            });
        }
        Ok(found)
    }

    /// The labels that it tells series apart by, but for those that Prometheus gives.
    #[must_use]
    pub fn grouped_by(&self) -> Vec<&str> {
        let lists = self.expr.split("by (").skip(1);
        let labels = lists.filter_map(|list| list.split_once(')'));
        let labels = labels.flat_map(|(list, _)| list.split(',').map(str::trim));
        labels.filter(|label| !GIVEN.contains(label)).collect()
    }
}

/// `state="ready"`, `endpoint=~"/encrypt|/decrypt"`, or what is left out: `section!="revocations"`.
fn matcher(one: &str) -> Result<(String, Vec<String>)> {
    let (label, value) = one.split_at(one.find(['=', '!']).context("no value")?);
    let value = value
        .trim_start_matches(['=', '!', '~'])
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .context("no quoted value")?;
    let values = value.split('|').map(str::to_owned);
    Ok((label.trim().to_owned(), values.collect()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
groups:
  - name: a
    rules:
      # Comment: of no interest.
      - alert: One
        expr: max by (job, slot) (hsm_slot_state{state="ready"}) == 0 or up{job=~"hsm-service.*"} == 0
        for: 1m
        annotations:
          description: >-
            Words: several.
          runbook: docs/a.md#b
      - alert: Two
        expr: |-
          sum by (job, le) (rate(hsm_x_bucket{endpoint=~"/a|/b", status="503"}[5m]))
          / hsm_y > 0.05
        annotations:
          runbook: docs/a.md#c
"#;

    #[test]
    fn what_an_alert_asks_for_is_found() {
        let [one, two] = &read(TEXT).unwrap()[..] else {
            panic!()
        };
        assert_eq!((one.name.as_str(), one.runbook.as_str()), ("One", "docs/a.md#b"));
        let selector = |name: &str, labels: &[(&str, &[&str])]| Selector {
            name: name.to_owned(),
            labels: labels
                .iter()
                .map(|(label, values)| {
                    (
                        (*label).to_owned(),
                        values.iter().map(|v| (*v).to_owned()).collect(),
                    )
                })
                .collect(),
        };
        let state = selector("hsm_slot_state", &[("state", &["ready"])]);
        assert_eq!(one.selectors().unwrap(), [state]);
        assert_eq!(one.grouped_by(), ["slot"]);
        let x = selector(
            "hsm_x_bucket",
            &[("endpoint", &["/a", "/b"]), ("status", &["503"])],
        );
        assert_eq!(two.selectors().unwrap(), [x, selector("hsm_y", &[])]);
        let without = ("section".to_owned(), vec!["revocations".to_owned()]);
        assert_eq!(matcher(r#"section!="revocations""#).unwrap(), without);
        assert_eq!(matcher(r#"section!~"revocations""#).unwrap(), without);
        assert_eq!(two.grouped_by(), ["le"]);
    }

    #[test]
    fn a_rule_that_is_not_whole_is_an_error() {
        assert!(read("").is_err() && read("- alert: One\n").is_err());
        let broken = Alert {
            name: "One".to_owned(),
            expr: "hsm_x{state=ready}".to_owned(),
            runbook: String::new(),
        };
        assert!(broken.selectors().is_err());
    }

    /// As pages show headings: `#a-slot-does-not-serve`.
    fn anchors(text: &str) -> Vec<String> {
        let headings = text.lines().filter(|line| line.starts_with('#'));
        let titles = headings.map(|line| line.trim_start_matches('#').trim().to_lowercase());
        let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
        titles
            .map(|title| title.chars().filter(kept).collect::<String>().replace(' ', "-"))
            .collect()
    }

    #[test]
    fn each_alert_is_explained_and_its_runbook_is_there() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let operations = std::fs::read_to_string(top.join("docs/operations.md")).unwrap();
        let known = anchors(&operations);
        for alert in shipped().unwrap() {
            let section = alert.runbook.strip_prefix("docs/operations.md#");
            let section = section.unwrap_or_else(|| panic!("{}: {}", alert.name, alert.runbook));
            assert!(
                known.iter().any(|anchor| anchor == section),
                "{}: {section}",
                alert.name
            );
            let row = format!("`{}`", alert.name);
            assert!(operations.contains(&row), "{row} is not in docs/operations.md");
        }
    }

    #[test]
    fn each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() {
        let mut cases = String::new();
        for entry in std::fs::read_dir(folder()).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().ends_with(".test.yaml") {
                cases.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
        for alert in shipped().unwrap() {
            let case = format!("alertname: {}\n        exp_alerts:", alert.name);
            assert!(cases.contains(&format!("{case}\n")), "{} never fires", alert.name);
            assert!(
                cases.contains(&format!("{case} []\n")),
                "{} is never quiet",
                alert.name
            );
        }
    }
}
