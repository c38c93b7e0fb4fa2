//! The PKCS#11 world of hsm-service and every secret in it: tokens, sessions, KEKs, transport
//! keys, envelopes, PINs. Synchronous; it knows no network, no consensus, no async runtime, and
//! it must never let a key leave a token unwrapped or a PIN reach a log.
//!
//! [`module::Module`] loads a PKCS#11 library once per process, [`slot::Slot`] opens one token
//! in it. A slot has two sides: *control* operations (create, find, destroy keys), which block
//! and are serialised, and *data* operations (encrypt, decrypt), which are queued to the slot's
//! own threads and answered by callback.

#![warn(missing_docs)]

pub mod check_record;
pub mod envelope;
pub mod error;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod module;
pub mod names;
pub mod pin;
pub mod profile;
pub mod replication;
pub mod return_codes;
pub mod secrets;
pub mod slot;
pub mod token_init;

#[cfg(feature = "test-support")]
pub mod test_support;

mod adopt;
mod attribute;
mod durable;
mod ffi;
mod gcm;
mod inventory;
mod kat;
mod kek;
mod login;
mod marshal;
mod node_key;
mod object_file;
mod seeded;
mod softhsm_files;
mod spki;
mod templates;
mod token;
mod token_lock;
mod transport;

pub use adopt::{AdoptKek, DestroyedAdopted};
pub use error::{HsmError, OpError, SlotError};
pub use inventory::{ForeignObject, HeldKey, Inventory};
pub use kek::{GenerateKek, GeneratedKek, ImportKek, KekUse};
pub use module::{Module, TokenInfo};
pub use pin::generate_pin;
pub use slot::{
    Ciphertext, DataKeyJob, DataKeySize, DecryptJob, DecryptV1Job, EncryptJob, OnBatchDone, OnDone, Output,
    Reseal, RewrapJob, SHARED_BY, Slot, SlotOptions, SlotState, TOKEN_REPLACED, Work, batch_time, batch_wait,
};
pub use token_init::{InitToken, init_token};
pub use transport::{CHECK_LEN as TRANSPORT_CHECK_LEN, OfferedTransportKey};
