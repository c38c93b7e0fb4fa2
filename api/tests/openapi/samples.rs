//! A value of every type that is sent, with all its members and with the fewest: written out, so that a new member does
//! not compile until it is here, and fails until it is in `docs/openapi.json`.

mod access;
mod cluster;
mod data;
mod keys;
mod rekey;

use hsm_api::ErrorCode;
use hsm_api::admin::*;
use hsm_api::data::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

pub(crate) use self::access::mappings;
use crate::checker::{Names, object};

/// A type with its members.
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    /// Every member is in it.
    pub(crate) full: Value,
    /// The members that it always has.
    pub(crate) required: Names,
    /// Whether `full` could be sent: of some members only one may be.
    pub(crate) sendable: bool,
    /// Whether the type can be read from this.
    pub(crate) reads: fn(&Value) -> Result<(), String>,
}

/// Every type whose members are described.
pub(crate) fn samples() -> Vec<Sample> {
    [
        data::samples(),
        cluster::samples(),
        keys::samples(),
        rekey::samples(),
        access::samples(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Every type that is one of a few words.
pub(crate) fn words() -> Vec<(&'static str, Vec<&'static str>)> {
    macro_rules! words_of {
        ($($name:ident)+) => {
            vec![$((stringify!($name), $name::ALL.iter().map(|word| word.as_str()).collect())),+]
        };
    }
    words_of![
        Purpose DataKeyBits HealthStatus KekStatus
        NodeRole MemberRole SlotState MemberState RemovalState
        KeyState KeyOrigin BindingMode
        TransportKeyState RekeyPhase
        ErrorCode
    ]
}

/// What a node reads: it must have what cannot be left out, and what the node asks for `besides`.
fn request<T: Serialize + DeserializeOwned>(name: &'static str, full: &T, besides: &[&str]) -> Sample {
    let full = value(full);
    let needed = |member: &&String| {
        let mut less = full.clone();
        less.as_object_mut().expect("an object").remove(*member);
        reads::<T>(&less).is_err()
    };
    let needed = object(&full).keys().filter(needed).cloned();
    let required = needed.chain(besides.iter().map(|member| (*member).to_owned()));
    Sample {
        name,
        required: required.collect(),
        sendable: true,
        reads: reads::<T>,
        full,
    }
}

/// What a node sends: it always has what it has if there is little to say.
fn answer<T: Serialize + DeserializeOwned>(name: &'static str, full: &T, least: &T) -> Sample {
    Sample {
        name,
        full: value(full),
        required: object(&value(least)).keys().cloned().collect(),
        sendable: true,
        reads: reads::<T>,
    }
}

/// Of some of its members only one may be sent.
fn with_alternatives(sample: Sample) -> Sample {
    Sample {
        sendable: false,
        ..sample
    }
}

pub(crate) fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).expect("every type has JSON")
}

/// From text, as it comes over the wire.
pub(crate) fn reads<T: DeserializeOwned>(value: &Value) -> Result<(), String> {
    let read = serde_json::from_str::<T>(&value.to_string());
    read.map(|_| ()).map_err(|error| error.to_string())
}

fn text(text: &str) -> String {
    text.to_owned()
}

fn list(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| text(word)).collect()
}

fn hash() -> String {
    "ab".repeat(32)
}

fn id() -> String {
    "ab".repeat(16)
}

fn time() -> String {
    text("2030-01-01T00:00:00Z")
}
