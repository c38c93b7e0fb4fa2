//! Golden bytes of every stored type, and of a whole store. A change here is a `DataChange`: the old form must stay
//! readable, so every line is also read back. `UPDATE_GOLDEN=1` writes the file anew.

mod before;
mod commands;
mod examples;
mod outcomes;
mod rows;
mod store;

use std::fmt::Write;

use raft_store::codec::{decode, encode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The lines of the golden file as this build writes them.
#[derive(Default)]
struct Lines(String);

impl Lines {
    fn bytes(&mut self, what: &str, bytes: &[u8]) {
        writeln!(self.0, "{what} {}", hex::encode(bytes)).unwrap();
    }

    fn value<T: Serialize>(&mut self, what: &str, value: &T) {
        self.bytes(what, &encode(value).unwrap());
    }
}

/// Bytes that decode to a `T` which encodes to them again.
fn survives<T: Serialize + DeserializeOwned>(bytes: &[u8]) -> bool {
    decode::<T>(bytes).is_ok_and(|value| encode(&value).is_ok_and(|again| again == bytes))
}

fn all() -> String {
    let mut lines = Lines::default();
    commands::lines(&mut lines);
    outcomes::lines(&mut lines);
    rows::lines(&mut lines);
    store::lines(&mut lines);
    lines.0
}

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/store/golden.txt");

fn golden() -> String {
    std::fs::read_to_string(FILE).unwrap()
}

/// The golden file's lines whose names begin so.
fn old(prefix: &str) -> Vec<(String, Vec<u8>)> {
    let golden = golden();
    let lines = golden.lines().map(|line| line.split_once(' ').unwrap());
    let wanted = lines.filter(|(what, _)| what.starts_with(prefix));
    wanted
        .map(|(what, bytes)| (what.to_string(), hex::decode(bytes).unwrap()))
        .collect()
}

#[test]
fn every_stored_type_has_the_bytes_it_always_had() {
    let all = all();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(FILE, &all).unwrap();
    }
    let golden = golden();
    for (now, then) in all.lines().zip(golden.lines()) {
        assert_eq!(now, then, "stored bytes changed: this is a DataChange");
    }
    assert_eq!(all.lines().count(), golden.lines().count());
}

#[test]
fn every_old_form_stays_readable() {
    for (what, bytes) in old("") {
        let read = commands::reads(&what, &bytes)
            .or_else(|| outcomes::reads(&what, &bytes))
            .or_else(|| rows::reads(&what, &bytes))
            // Read together, as the store that they are.
            .or_else(|| what.starts_with("store.").then_some(true));
        assert_eq!(read, Some(true), "{what}");
    }
}
