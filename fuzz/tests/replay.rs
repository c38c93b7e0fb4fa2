//! The corpus, every time; and changes of it by chance. What fails here is a fault of a parser: see docs/testing.md.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use hsm_fuzz::{TARGETS, Target, corpus};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

/// Files of one target, so that the corpus stays a choice.
const MOST_FILES: usize = 80;
/// Bytes of one file.
const LARGEST_FILE: usize = 32 * 1024;
/// Changed inputs of one target in one run.
const CHANGED: u32 = 256;

/// A target's files with their names, in order.
fn files(target: &Target) -> Vec<(String, Vec<u8>)> {
    let folder = corpus().join(target.name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

fn is_accepted(name: &str) -> bool {
    !name.starts_with("refused-") && !name.starts_with("crash-")
}

#[test]
fn every_file_of_the_corpus_keeps_its_property() {
    let mut failed = Vec::new();
    for target in TARGETS {
        for (name, data) in files(target) {
            let checked = catch_unwind(AssertUnwindSafe(|| (target.check)(&data)));
            match checked {
                Ok(accepted) if accepted == is_accepted(&name) || name.starts_with("crash-") => {}
                Ok(true) => failed.push(format!("{}/{name}: is accepted", target.name)),
                Ok(false) => failed.push(format!("{}/{name}: is refused", target.name)),
                Err(_) => failed.push(format!("{}/{name}: its property does not hold", target.name)),
            }
        }
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn every_target_has_a_small_corpus_of_its_own_with_something_that_is_accepted() {
    let names: BTreeSet<String> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    assert_eq!(names.len(), TARGETS.len());
    let folders = std::fs::read_dir(corpus()).unwrap();
    let folders: BTreeSet<String> = folders
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
        .collect();
    assert_eq!(folders, names);
    for target in TARGETS {
        let files = files(target);
        assert!(
            files.len() <= MOST_FILES,
            "{}: {} files",
            target.name,
            files.len()
        );
        assert!(
            files.iter().any(|(name, _)| is_accepted(name)),
            "{}: nothing is accepted",
            target.name
        );
        for (name, data) in files {
            assert!(data.len() <= LARGEST_FILE, "{}/{name}", target.name);
        }
    }
}

/// The frames of the cluster protocol have no file that they could be taken from. A file is only ever added: what an
/// older release sent stays in the corpus. `UPDATE_CORPUS=1` adds those that are missing.
#[test]
fn every_message_between_nodes_is_in_the_corpus() {
    let folder = corpus().join("wire");
    for (name, bytes) in hsm_node::fuzzing::wire_seeds() {
        let path = folder.join(name);
        if std::env::var_os("UPDATE_CORPUS").is_some() && !path.exists() {
            std::fs::write(&path, &bytes).unwrap();
        }
        let known = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(
            known == bytes,
            "{}: nodes of this build send something else; add it under another name",
            path.display()
        );
    }
}

/// What one change does to an input.
type Change = (u8, Index, Index, Vec<u8>);

fn changes() -> impl Strategy<Value = (Index, Vec<Change>)> {
    let bytes = proptest::collection::vec(any::<u8>(), 1..9);
    let change = (0_u8..6, any::<Index>(), any::<Index>(), bytes);
    (any::<Index>(), proptest::collection::vec(change, 0..6))
}

fn changed(files: &[(String, Vec<u8>)], begin: Index, changes: &[Change]) -> Vec<u8> {
    let mut data = begin.get(files).1.clone();
    for (kind, at, other, bytes) in changes {
        let place = at.index(data.len() + 1);
        match kind {
            0 => {
                for (old, new) in data[place..].iter_mut().zip(bytes) {
                    *old = *new;
                }
            }
            1 => data = [&data[..place], bytes, &data[place..]].concat(),
            2 => {
                let end = data.len().min(place + other.index(17));
                data.drain(place..end);
            }
            3 => data.truncate(place),
            4 => {
                if let Some(byte) = data.get_mut(place) {
                    *byte ^= 1 << (bytes[0] % 8);
                }
            }
            _ => {
                let tail = &other.get(files).1;
                data.truncate(place);
                data.extend_from_slice(&tail[place.min(tail.len())..]);
            }
        }
    }
    data
}

#[test]
fn whatever_is_made_of_the_corpus_keeps_its_property() {
    for target in TARGETS {
        let files = files(target);
        let config = Config {
            cases: CHANGED,
            failure_persistence: None,
            ..Config::default()
        };
        let outcome = TestRunner::new(config).run(&changes(), |(begin, changes)| {
            let data = changed(&files, begin, &changes);
            let checked = catch_unwind(AssertUnwindSafe(|| (target.check)(&data)));
            prop_assert!(checked.is_ok(), "{}", keep(target, &data));
            Ok(())
        });
        if let Err(error) = outcome {
            panic!("{}: {error}", target.name);
        }
    }
}

/// Leaves an input where it can be looked at, and says where.
fn keep(target: &Target, data: &[u8]) -> String {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{}", target.name));
    std::fs::write(&path, data).unwrap();
    format!(
        "the property of {} does not hold for {}; mend the parser, and put the file into fuzz/corpus/{}",
        target.name,
        path.display(),
        target.name
    )
}
