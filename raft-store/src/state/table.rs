//! A replicated table: a persistent ordered map whose clones are cheap, and which remembers the rows
//! touched since it was last asked, so that storage writes only those.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use rpds::{RedBlackTreeMapSync, RedBlackTreeSetSync};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::command::{Bounded, Invalid, Refusal};

/// Bytes of a row's key that are kept: keys of this size never make an index node that sled would spill into a
/// blob file.
pub const MAX_KEY: usize = 1024;

/// Kind byte of each stored row. Never renumber: it is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[repr(u8)]
pub enum RowKind {
    /// Cluster identity and epoch, one row.
    Meta = 1,
    /// A context.
    Context = 2,
    /// A key version.
    Version = 3,
    /// A slot with its transport generations.
    Slot = 4,
    /// A node, members and tombstones alike.
    Node = 5,
    /// The latest report of a node.
    Report = 6,
    /// Access control, one row.
    Acl = 7,
    /// A revocation.
    Revocation = 8,
    /// A remembered request.
    Request = 9,
    /// A join token.
    JoinToken = 10,
    /// How often a key version was used.
    Use = 11,
    /// Until when a node that counts uses did not.
    Uncounted = 12,
    /// How many invocations of a key version were given out.
    Lease = 13,
    /// A quorum that was lost and recovered.
    Recovery = 14,
    /// Which replication keys there are besides the cluster's, one row.
    Replication = 15,
    /// Applied log id, membership and digest, one row. Written by storage, not by commands.
    Applied = 100,
}

impl RowKind {
    /// Every kind that belongs to the replicated state.
    pub const STATE: [RowKind; 15] = [
        RowKind::Meta,
        RowKind::Context,
        RowKind::Version,
        RowKind::Slot,
        RowKind::Node,
        RowKind::Report,
        RowKind::Acl,
        RowKind::Revocation,
        RowKind::Request,
        RowKind::JoinToken,
        RowKind::Use,
        RowKind::Uncounted,
        RowKind::Lease,
        RowKind::Recovery,
        RowKind::Replication,
    ];

    /// The kind of a stored byte, if this release knows it.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::STATE
            .into_iter()
            .chain([RowKind::Applied])
            .find(|kind| *kind as u8 == byte)
    }

    /// The newest version its rows are written in: it goes up whenever their encoding changes.
    pub const fn version(self) -> u8 {
        match self {
            RowKind::Meta => 1,
            RowKind::Context => 2,
            RowKind::Version => 4,
            RowKind::Slot => 3,
            RowKind::Node => 1,
            RowKind::Report => 2,
            RowKind::Acl => 2,
            RowKind::Revocation => 1,
            RowKind::Request => 1,
            RowKind::JoinToken => 1,
            RowKind::Use => 1,
            RowKind::Uncounted => 1,
            RowKind::Lease => 1,
            RowKind::Recovery => 1,
            RowKind::Replication => 1,
            RowKind::Applied => 1,
        }
    }

    /// Bytes that one of its rows may encode to. A command that would make a larger one is refused: when a
    /// committed entry is applied, there is nobody left to refuse it.
    pub const fn limit(self) -> usize {
        match self {
            RowKind::Meta | RowKind::Context | RowKind::JoinToken | RowKind::Uncounted => 4 << 10,
            // The window remembers tens of thousands of them.
            RowKind::Request => 2 << 10,
            RowKind::Replication => 16 << 10,
            RowKind::Version => 32 << 10,
            RowKind::Report | RowKind::Revocation | RowKind::Use | RowKind::Lease | RowKind::Recovery => {
                64 << 10
            }
            RowKind::Slot | RowKind::Node | RowKind::Acl | RowKind::Applied => 128 << 10,
        }
    }

    /// Its name in messages.
    pub const fn name(self) -> &'static str {
        match self {
            RowKind::Meta => "meta",
            RowKind::Context => "context",
            RowKind::Version => "version",
            RowKind::Slot => "slot",
            RowKind::Node => "node",
            RowKind::Report => "report",
            RowKind::Acl => "acl",
            RowKind::Revocation => "revocation",
            RowKind::Request => "request",
            RowKind::JoinToken => "join_token",
            RowKind::Use => "use",
            RowKind::Uncounted => "uncounted",
            RowKind::Lease => "lease",
            RowKind::Recovery => "recovery",
            RowKind::Replication => "replication",
            RowKind::Applied => "applied",
        }
    }
}

impl fmt::Display for RowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<RowKind> for u8 {
    fn from(kind: RowKind) -> Self {
        kind as u8
    }
}

impl TryFrom<u8> for RowKind {
    type Error = String;

    fn try_from(byte: u8) -> Result<Self, String> {
        // As serde says it of an enum, so that a kind of a newer release is not taken for damage.
        Self::from_byte(byte).ok_or_else(|| format!("no row kind has variant index {byte}"))
    }
}

/// Why a stored row cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It is not what was written.
    #[error("{0}")]
    Damaged(String),
    /// This release does not know its version, or something in it.
    #[error("{0}")]
    Newer(String),
}

impl From<CodecError> for LoadError {
    fn from(error: CodecError) -> Self {
        if error.is_unknown_variant() {
            Self::Newer(error.to_string())
        } else {
            Self::Damaged(error.to_string())
        }
    }
}

/// A value that is stored as a row.
pub trait Row: Serialize + DeserializeOwned {
    /// Its kind.
    const KIND: RowKind;
    /// The newest version it is written in.
    const VERSION: u8 = Self::KIND.version();
    /// Whether rows of this kind come to an end and stay as tombstones: the others are found without a look at those.
    const ENDS: bool = false;

    /// Whether this one has come to its end.
    fn is_over(&self) -> bool {
        false
    }

    /// The version that this row is written in, and its bytes. A row with a past is written in the oldest form that says
    /// all that it says: members of the release before read what does not need the new one, and equal rows have equal
    /// bytes, whichever release wrote them.
    fn written(&self) -> Result<(u8, Vec<u8>), CodecError> {
        Ok((Self::VERSION, codec::encode(self)?))
    }

    /// Bytes of what [`Row::written`] gives (compared in debug builds, at each write). It decides what is refused, so
    /// that every release has to say the same.
    fn written_size(&self) -> u64 {
        codec::size(self)
    }

    /// Reads a stored row of any version up to the present one. A row with a past has a `decode` of its own:
    /// one arm for each version, from the frozen struct of that version.
    fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
        match version {
            current if current == Self::VERSION => Ok(codec::decode(bytes)?),
            other => Err(unknown_version(Self::KIND, other)),
        }
    }
}

/// The error of a row whose version is none that this release reads.
pub(crate) fn unknown_version(kind: RowKind, version: u8) -> LoadError {
    let what = format!("a {kind} row of version {version}");
    if version > kind.version() {
        LoadError::Newer(what)
    } else {
        LoadError::Damaged(format!("{what}, which no release wrote"))
    }
}

/// A key of a row; its bytes sort as the key does.
pub trait RowKey: Ord + Clone {
    /// The bytes that follow the kind byte.
    fn encode(&self) -> Vec<u8>;
    /// The reverse; `None` when the bytes are no such key.
    fn decode(bytes: &[u8]) -> Option<Self>;
}

impl RowKey for () {
    fn encode(&self) -> Vec<u8> {
        Vec::new()
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        bytes.is_empty().then_some(())
    }
}

impl RowKey for u64 {
    fn encode(&self) -> Vec<u8> {
        self.to_be_bytes().to_vec()
    }
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(u64::from_be_bytes(bytes.try_into().ok()?))
    }
}

macro_rules! name_key {
    ($type:ty) => {
        impl RowKey for $type {
            fn encode(&self) -> Vec<u8> {
                self.as_str().as_bytes().to_vec()
            }
            fn decode(bytes: &[u8]) -> Option<Self> {
                Self::new(std::str::from_utf8(bytes).ok()?).ok()
            }
        }
    };
}
name_key!(crate::names::ContextName);
name_key!(crate::names::SlotName);

/// A row as storage sees it: kind, key bytes and, unless it was removed, its encoded value.
#[derive(Debug)]
pub struct RowChange {
    /// Its kind.
    pub kind: RowKind,
    /// The version its value is encoded in.
    pub version: u8,
    /// Its key.
    pub key: Vec<u8>,
    /// Its value, `None` when removed.
    pub value: Option<Vec<u8>>,
}

/// See the module.
#[derive(Clone)]
pub struct Table<K: RowKey, V: Row> {
    rows: RedBlackTreeMapSync<K, Arc<V>>,
    /// Keys of the rows that are not over, of kinds that end: after years nearly all rows are tombstones, and every
    /// command that asks for the others would look at each of them.
    open: RedBlackTreeSetSync<K>,
    touched: BTreeSet<K>,
    /// Another one after each change: clones that have the same have the same rows.
    mark: Arc<()>,
}

impl<K: RowKey, V: Row> Default for Table<K, V> {
    fn default() -> Self {
        Self {
            rows: RedBlackTreeMapSync::new_sync(),
            open: RedBlackTreeSetSync::new_sync(),
            touched: BTreeSet::new(),
            mark: Arc::new(()),
        }
    }
}

impl<K: RowKey, V: Row> Table<K, V> {
    /// The row under `key`.
    pub fn get<Q>(&self, key: &Q) -> Option<&Arc<V>>
    where
        K: std::borrow::Borrow<Q>,
        Q: Ord + ?Sized,
    {
        self.rows.get(key)
    }

    /// Whether there is a row under `key`.
    pub fn contains<Q>(&self, key: &Q) -> bool
    where
        K: std::borrow::Borrow<Q>,
        Q: Ord + ?Sized,
    {
        self.rows.contains_key(key)
    }

    /// All rows in key order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Arc<V>)> {
        self.rows.iter()
    }

    /// All rows whose keys lie in `range`, in order.
    pub fn range<R: std::ops::RangeBounds<K>>(&self, range: R) -> impl Iterator<Item = (&K, &Arc<V>)> {
        self.rows.range(range)
    }

    /// All values in key order.
    pub fn values(&self) -> impl Iterator<Item = &Arc<V>> {
        self.rows.values()
    }

    /// All rows that are not over, in key order; of a kind that never ends, none.
    pub(crate) fn open(&self) -> impl Iterator<Item = (&K, &Arc<V>)> {
        let keys = self.open.iter();
        keys.filter_map(move |key| self.rows.get(key).map(|row| (key, row)))
    }

    fn note_open(&mut self, key: &K, value: &V) {
        if V::ENDS && value.is_over() {
            self.open.remove_mut(key);
        } else if V::ENDS {
            self.open.insert_mut(key.clone());
        }
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether this is a clone of that one, or the reverse, without any change in between. False says nothing.
    pub fn is_clone_of(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mark, &other.mark)
    }

    /// The first row in key order.
    pub fn first(&self) -> Option<(&K, &Arc<V>)> {
        self.rows.first()
    }

    /// Adds or replaces a row, unless it is larger than rows of its kind may be. Every command comes through
    /// here, so that none can make a row that storage would have to refuse.
    pub(crate) fn put(&mut self, key: K, value: V) -> Result<(), Refusal> {
        let stored = key.encode();
        Bounded::RowKey(V::KIND).check(stored.len(), MAX_KEY)?;
        // A row is found again by its stored key only.
        if K::decode(&stored).as_ref() != Some(&key) {
            return Err(Invalid::Key { kind: V::KIND }.into());
        }
        let size = usize::try_from(value.written_size()).unwrap_or(usize::MAX);
        Bounded::Row(V::KIND).check(size, V::KIND.limit())?;
        self.touched.insert(key.clone());
        self.note_open(&key, &value);
        self.rows.insert_mut(key, Arc::new(value));
        self.mark = Arc::new(());
        Ok(())
    }

    pub(crate) fn remove(&mut self, key: &K) {
        if self.rows.remove_mut(key) {
            self.open.remove_mut(key);
            self.touched.insert(key.clone());
            self.mark = Arc::new(());
        }
    }

    /// Encodes and forgets what was touched.
    pub(crate) fn drain(&mut self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        for key in std::mem::take(&mut self.touched) {
            let (version, value) = match self.rows.get(&key) {
                Some(row) => {
                    let (version, bytes) = V::written(row)?;
                    debug_assert_eq!(bytes.len() as u64, row.written_size(), "{}", V::KIND);
                    (version, Some(bytes))
                }
                None => (V::VERSION, None),
            };
            out.push(RowChange {
                kind: V::KIND,
                version,
                key: key.encode(),
                value,
            });
        }
        Ok(())
    }

    /// Encodes every row.
    pub(crate) fn dump(&self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        for (key, row) in self.rows.iter() {
            let (version, bytes) = V::written(row)?;
            out.push(RowChange {
                kind: V::KIND,
                version,
                key: key.encode(),
                value: Some(bytes),
            });
        }
        Ok(())
    }

    /// Puts a stored row back, without marking it touched.
    pub(crate) fn load(&mut self, version: u8, key: &[u8], value: &[u8]) -> Result<(), LoadError> {
        self.load_by(key, |_| V::decode(version, value))
    }

    /// As [`Self::load`], of a row that is read with more than its own bytes.
    pub(crate) fn load_by(
        &mut self,
        key: &[u8],
        decode: impl FnOnce(&K) -> Result<V, LoadError>,
    ) -> Result<(), LoadError> {
        let kind = V::KIND;
        let decoded = K::decode(key)
            .ok_or_else(|| LoadError::Damaged(format!("a {kind} row has a key that does not decode")))?;
        let value = decode(&decoded)?;
        self.note_open(&decoded, &value);
        self.rows.insert_mut(decoded, Arc::new(value));
        self.mark = Arc::new(());
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A row as it is now, and as a release before wrote it.
    #[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
    struct Now {
        text: String,
    }
    #[derive(Serialize, Deserialize)]
    struct Before {
        number: u8,
    }

    impl Row for Now {
        const KIND: RowKind = RowKind::Context;
        const VERSION: u8 = 2;

        fn decode(version: u8, bytes: &[u8]) -> Result<Self, LoadError> {
            match version {
                1 => {
                    let before: Before = codec::decode(bytes)?;
                    let text = before.number.to_string();
                    Ok(Now { text })
                }
                2 => Ok(codec::decode(bytes)?),
                other => Err(unknown_version(Self::KIND, other)),
            }
        }
    }

    #[test]
    fn a_row_of_an_older_version_is_upgraded_as_it_is_read() {
        let mut table = Table::<u64, Now>::default();
        let key = RowKey::encode(&7u64);
        let before = codec::encode(&Before { number: 9 }).unwrap();
        table.load(1, &key, &before).unwrap();
        assert_eq!(table.get(&7).unwrap().text, "9");
        let (mut rows, text) = (Vec::new(), "ten".to_owned());
        table.put(7, Now { text }).unwrap();
        table.drain(&mut rows).unwrap();
        assert_eq!(rows[0].version, 2, "what is written is of the present version");
        table.load(2, &key, rows[0].value.as_deref().unwrap()).unwrap();
    }

    #[test]
    fn a_row_of_a_newer_version_is_told_apart_from_a_damaged_one() {
        let mut table = Table::<u64, Now>::default();
        let key = RowKey::encode(&7u64);
        let newer = table.load(3, &key, &[]).unwrap_err();
        assert!(matches!(newer, LoadError::Newer(what) if what.contains("version 3")));
        let cases: [(u8, &[u8], &[u8]); 3] = [(0, &key, &[]), (2, &key, &[1]), (2, &[1], &[])];
        for (version, key, value) in cases {
            let damaged = table.load(version, key, value).unwrap_err();
            assert!(matches!(damaged, LoadError::Damaged(_)), "{damaged}");
        }
    }

    #[test]
    fn a_table_knows_its_clones_until_one_of_them_changes() {
        let mut table = Table::<u64, Now>::default();
        let row = |text: &str| Now {
            text: text.to_owned(),
        };
        table.put(7, row("a")).unwrap();
        let before = table.clone();
        assert!(table.is_clone_of(&before) && before.is_clone_of(&table));
        table.remove(&8);
        assert!(table.is_clone_of(&before), "there was nothing to remove");
        // As many rows as before, and others.
        table.remove(&7);
        table.put(8, row("a")).unwrap();
        assert!(!table.is_clone_of(&before));
        assert!(!table.is_clone_of(&Table::default()));
    }

    /// A row that ends.
    #[derive(Clone, Serialize, Deserialize, Debug, PartialEq)]
    struct Mortal {
        over: bool,
    }

    impl Row for Mortal {
        const KIND: RowKind = RowKind::Version;
        const VERSION: u8 = 1;
        const ENDS: bool = true;

        fn is_over(&self) -> bool {
            self.over
        }
    }

    #[test]
    fn a_table_knows_its_rows_that_are_not_over_however_they_came() {
        let mut table = Table::<u64, Mortal>::default();
        let open = |table: &Table<u64, Mortal>| -> Vec<u64> { table.open().map(|(key, _)| *key).collect() };
        for key in [3, 1, 2] {
            table.put(key, Mortal { over: false }).unwrap();
        }
        let before = table.clone();
        table.put(2, Mortal { over: true }).unwrap();
        table.put(4, Mortal { over: true }).unwrap();
        assert_eq!(open(&table), [1, 3]);
        table.put(2, Mortal { over: false }).unwrap();
        table.remove(&1);
        assert_eq!(open(&table), [2, 3]);
        let mut loaded = Table::<u64, Mortal>::default();
        for (key, over) in [(7u64, true), (8, false)] {
            let value = codec::encode(&Mortal { over }).unwrap();
            loaded.load(1, &RowKey::encode(&key), &value).unwrap();
        }
        assert_eq!(open(&loaded), [8]);
        assert_eq!(open(&before), [1, 2, 3], "a clone keeps what it had");
    }

    #[test]
    fn every_kind_survives_its_byte_and_has_a_name_of_its_own() {
        let mut names = BTreeSet::new();
        for kind in RowKind::STATE.into_iter().chain([RowKind::Applied]) {
            assert_eq!(RowKind::try_from(u8::from(kind)), Ok(kind));
            assert_eq!(codec::decode::<RowKind>(&[kind as u8]).unwrap(), kind);
            assert!(names.insert(kind.name()));
        }
        let newer = codec::decode::<RowKind>(&[77]).unwrap_err();
        assert!(newer.is_unknown_variant(), "{newer}");
    }
}
