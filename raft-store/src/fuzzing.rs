//! For each encoding of this crate a property that holds whatever the bytes are. A function panics where it does not
//! hold, and otherwise says whether the bytes were accepted. The crate `hsm-fuzz` feeds them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{self, MAX_COMMAND_BYTES};
use crate::command::{ApplyContext, Command, Outcome, apply};
use crate::names::{ContextName, ContextUid, NodeName, SlotName};
use crate::state::ClusterState;
use crate::state::access::RevocationKey;
use crate::state::context::{BindingMode, Context, RotationPolicy, VersionKey};
use crate::state::table::{RowChange, RowKey, RowKind};
use crate::{Entry, LogId, SnapshotMeta, StoredMembership, Vote};

pub use crate::storage::fuzzing::{control_slot, frames, snapshot};

/// Most commands of one input.
const MOST_COMMANDS: usize = 64;

/// Whatever decodes is written in one form, which is no longer and gives the same again. Bytes in another form (a map
/// out of order) are read all the same.
pub(crate) fn has_one_form<T: Serialize + DeserializeOwned>(data: &[u8]) -> bool {
    let Ok(value) = codec::decode::<T>(data) else {
        return false;
    };
    let written = codec::encode(&value).unwrap();
    assert!(written.len() <= data.len());
    assert_eq!(codec::size(&value), written.len() as u64);
    let again: T = codec::decode(&written).expect("what was written is read");
    assert_eq!(codec::encode(&again).unwrap(), written);
    true
}

/// A command, as it lies in the log and travels.
pub fn command(data: &[u8]) -> bool {
    has_one_form::<Command>(data)
}

/// What Raft keeps besides: the first byte says what.
pub fn log_record(data: &[u8]) -> bool {
    let Some((kind, data)) = data.split_first() else {
        return false;
    };
    match kind {
        0 => has_one_form::<Entry>(data),
        1 => has_one_form::<Vote>(data),
        2 => has_one_form::<LogId>(data),
        3 => has_one_form::<SnapshotMeta>(data),
        4 => has_one_form::<StoredMembership>(data),
        _ => false,
    }
}

/// A row of the state, of any kind and version: kind, version, length of the key (u8), key, value. What is loaded is
/// written under the same key in the present version, which loads to the same.
pub fn row(data: &[u8]) -> bool {
    let Some(([kind, version, length], rest)) = data.split_first_chunk::<3>() else {
        return false;
    };
    let (Some(kind), Some((key, value))) = (
        RowKind::from_byte(*kind),
        rest.split_at_checked(usize::from(*length)),
    ) else {
        return false;
    };
    let mut state = ClusterState::default();
    if let Some(key) = VersionKey::decode(key).filter(|_| kind == RowKind::Version) {
        state.contexts.put(key.context, a_context()).unwrap();
    }
    if state.load(kind, *version, key, value).is_err() {
        return false;
    }
    let mut rows = state.loaded().dump().unwrap();
    rows.retain(|row| row.kind == kind);
    let [row] = rows.as_slice() else {
        panic!("one row was loaded and {} came out", rows.len());
    };
    assert_eq!(row.kind, kind);
    assert!(row.version <= kind.version(), "a version that nobody reads");
    assert_eq!(row.key, key, "another key would be another row");
    let written = row.value.as_deref().unwrap();
    if *version == row.version {
        assert!(written.len() <= value.len());
    }
    let again = restored(&rows).dump().unwrap();
    assert!(same(&rows, &again));
    true
}

/// What the oldest rows of versions are read with: they do not say in which slot they are.
fn a_context() -> Context {
    Context {
        uid: ContextUid([1; 16]),
        slot: SlotName::new("s").unwrap(),
        binding: BindingMode::Shared,
        policy: RotationPolicy::default(),
        highest_version: 1,
        active_version: None,
        created_at: 0,
    }
}

fn same(one: &[RowChange], other: &[RowChange]) -> bool {
    let told = |rows: &[RowChange]| -> Vec<_> {
        let rows = rows.iter();
        rows.map(|row| (row.kind, row.version, row.key.clone(), row.value.clone()))
            .collect()
    };
    told(one) == told(other)
}

fn restored(rows: &[RowChange]) -> ClusterState {
    let mut state = ClusterState::default();
    for row in rows {
        let value = row.value.as_deref().unwrap_or_default();
        state.load(row.kind, row.version, &row.key, value).unwrap();
    }
    state.loaded()
}

/// The key of a row, which is found by its bytes: the first byte says of which type.
pub fn row_key(data: &[u8]) -> bool {
    fn key<K: RowKey>(bytes: &[u8]) -> bool {
        let Some(key) = K::decode(bytes) else { return false };
        assert_eq!(key.encode(), bytes);
        true
    }
    let Some((kind, data)) = data.split_first() else {
        return false;
    };
    match kind {
        0 => key::<()>(data),
        1 => key::<u64>(data),
        2 => key::<ContextName>(data),
        3 => key::<SlotName>(data),
        4 => key::<VersionKey>(data),
        5 => key::<RevocationKey>(data),
        _ => false,
    }
}

/// A name of a context, slot or node.
pub fn name(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    match ContextName::new(text) {
        Ok(name) => {
            assert_eq!(name.as_str(), text);
            assert!(SlotName::new(text).is_ok() && NodeName::new(text).is_ok());
            // It becomes part of paths, labels and log lines.
            assert!(text.len() <= 64 && !text.starts_with('.') && !text.contains('/'));
            true
        }
        Err(error) => {
            assert!(error.value.chars().count() <= 80);
            false
        }
    }
}

/// Commands in a row, each behind its length (u16, big-endian), on two replicas of an empty cluster: they answer the
/// same, keep within the limits of rows, and what a snapshot of one holds is the state of both. Whatever was
/// committed is applied, so nothing that decodes may panic.
pub fn commands(data: &[u8]) -> bool {
    let (mut one, mut two) = (ClusterState::default(), ClusterState::default());
    let voters = BTreeSet::from([1]);
    let mut done = false;
    for (command, index) in read_commands(data).iter().zip(1_u64..) {
        let cx = ApplyContext {
            index,
            at: command.at,
            origin: &command.origin,
            leader: 1,
            voters: &voters,
        };
        let outcome = apply(&mut one, command, &cx);
        assert_eq!(apply(&mut two, command, &cx), outcome);
        done |= matches!(outcome, Outcome::Done(_));
        for row in one.drain().unwrap() {
            let size = row.value.as_ref().map_or(0, Vec::len);
            assert!(size <= row.kind.limit(), "a {} row of {size} bytes", row.kind);
        }
    }
    let rows = one.dump().unwrap();
    assert!(same(&rows, &two.dump().unwrap()));
    assert!(same(&rows, &restored(&rows).dump().unwrap()));
    done
}

fn read_commands(mut data: &[u8]) -> Vec<Command> {
    let mut commands = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(rest.len());
        let (bytes, rest) = rest.split_at(length);
        data = rest;
        // What is larger or does not decode was never proposed.
        if bytes.len() <= MAX_COMMAND_BYTES
            && let Ok(command) = codec::decode(bytes)
        {
            commands.push(command);
        }
        if commands.len() == MOST_COMMANDS {
            break;
        }
    }
    commands
}
