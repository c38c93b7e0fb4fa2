//! A replicated table: a persistent ordered map whose clones are cheap, and which remembers the rows
//! touched since it was last asked, so that storage writes only those.

use std::collections::BTreeSet;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::{self, CodecError};

/// Kind byte of each stored row. Never renumber: it is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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
    /// Applied log id, membership and digest, one row. Written by storage, not by commands.
    Applied = 100,
}

impl RowKind {
    /// Every kind that belongs to the replicated state.
    pub const STATE: [RowKind; 10] = [
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
    ];

    /// The kind of a stored byte, if this release knows it.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::STATE
            .into_iter()
            .chain([RowKind::Applied])
            .find(|kind| *kind as u8 == byte)
    }
}

/// A value that is stored as a row.
pub trait Row: Serialize + DeserializeOwned {
    /// Its kind.
    const KIND: RowKind;
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
    /// Its key.
    pub key: Vec<u8>,
    /// Its value, `None` when removed.
    pub value: Option<Vec<u8>>,
}

/// See the module.
#[derive(Clone)]
pub struct Table<K: RowKey, V: Row> {
    rows: RedBlackTreeMapSync<K, Arc<V>>,
    touched: BTreeSet<K>,
}

impl<K: RowKey, V: Row> Default for Table<K, V> {
    fn default() -> Self {
        Self {
            rows: RedBlackTreeMapSync::new_sync(),
            touched: BTreeSet::new(),
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

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.size()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The first row in key order.
    pub fn first(&self) -> Option<(&K, &Arc<V>)> {
        self.rows.first()
    }

    pub(crate) fn put(&mut self, key: K, value: V) {
        self.touched.insert(key.clone());
        self.rows.insert_mut(key, Arc::new(value));
    }

    pub(crate) fn remove(&mut self, key: &K) {
        if self.rows.remove_mut(key) {
            self.touched.insert(key.clone());
        }
    }

    /// Encodes and forgets what was touched.
    pub(crate) fn drain(&mut self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        for key in std::mem::take(&mut self.touched) {
            let value = match self.rows.get(&key) {
                Some(value) => Some(codec::encode(&**value)?),
                None => None,
            };
            out.push(RowChange {
                kind: V::KIND,
                key: key.encode(),
                value,
            });
        }
        Ok(())
    }

    /// Encodes every row.
    pub(crate) fn dump(&self, out: &mut Vec<RowChange>) -> Result<(), CodecError> {
        for (key, value) in self.rows.iter() {
            out.push(RowChange {
                kind: V::KIND,
                key: key.encode(),
                value: Some(codec::encode(&**value)?),
            });
        }
        Ok(())
    }

    /// Puts a stored row back, without marking it touched. `None` when key or value do not decode.
    pub(crate) fn load(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        self.rows
            .insert_mut(K::decode(key)?, Arc::new(codec::decode(value).ok()?));
        Some(())
    }
}
