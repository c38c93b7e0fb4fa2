//! A token without PKCS#11, and how it fails. Its "cipher" only authenticates: its tag is a hash over associated data and
//! plaintext, which is all these tests look at.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use hsm_core::envelope::{Binding, HEADER_LEN, Header, Purpose, TAG_LEN, aad_v1, aad_v2};
use hsm_core::names::KeyUid;
use hsm_core::secrets::Plaintext;
use hsm_core::{
    Ciphertext, DataKeyJob, DecryptJob, DecryptV1Job, EncryptJob, OnBatchDone, OnDone, OpError, Output,
    RewrapJob, SlotState, Work,
};
use sha2::{Digest, Sha256};

use super::uid;
use crate::keyring::TokenOps;

#[derive(Clone, Copy)]
pub(in crate::http::tests) enum Trouble {
    Locked,
    Failed,
    QueueFull,
    Hangs,
    Gone,
    /// Every job takes so long.
    Slow(Duration),
    /// There is time for so many items of a batch, and for no single job.
    OutOfTime(usize),
}

#[derive(Default)]
pub(in crate::http::tests) struct FakeToken {
    trouble: Mutex<Option<Trouble>>,
    /// Callbacks of jobs that hang.
    hanging: Mutex<Vec<Box<dyn std::any::Any + Send>>>,
    /// How many items each batch had.
    batches: Mutex<Vec<usize>>,
    /// How long the caller of the last batch waits.
    until: Mutex<Option<Instant>>,
}

fn tag(aad: &[u8], plaintext: &[u8]) -> [u8; TAG_LEN] {
    let hash = Sha256::new().chain_update(aad).chain_update(plaintext).finalize();
    hash[..TAG_LEN].try_into().unwrap()
}

fn open(aad: &[u8], sealed: &[u8]) -> Result<Plaintext, OpError> {
    let (plaintext, found) = sealed.split_at(sealed.len() - TAG_LEN);
    if tag(aad, plaintext) == found {
        Ok(Plaintext::new(plaintext.to_vec()))
    } else {
        Err(OpError::AuthenticationFailed)
    }
}

pub(in crate::http::tests) fn v1_ciphertext(context: &str, x: &str, plaintext: &[u8]) -> Vec<u8> {
    let mut out = vec![9; 12];
    out.extend_from_slice(plaintext);
    out.extend_from_slice(&tag(&aad_v1(context, x), plaintext));
    out
}

/// What a new ciphertext is under and for.
struct Under<'a> {
    purpose: Purpose,
    binding: Binding,
    key_uid: KeyUid,
    version: u32,
    context: &'a str,
    binding_value: &'a str,
    aad: &'a [u8],
}

fn seal(under: &Under<'_>, plaintext: &Plaintext) -> Vec<u8> {
    let mut out = Header {
        purpose: under.purpose,
        binding: under.binding,
        key_uid: under.key_uid,
        version: under.version,
        iv: [5; 12],
    }
    .encode();
    let mut aad = aad_v2(&out, under.context, under.binding_value, under.aad);
    aad.extend_from_slice(&out[..HEADER_LEN]);
    out.extend_from_slice(plaintext.as_slice());
    out.extend_from_slice(&tag(&aad, plaintext.as_slice()));
    out
}

fn open_v2(job: &DecryptJob) -> Result<Plaintext, OpError> {
    let (header, sealed) = job.ciphertext.split_at(HEADER_LEN);
    let mut aad = aad_v2(header, &job.context, &job.binding_value, &job.aad);
    aad.extend_from_slice(header);
    open(&aad, sealed)
}

fn open_v1(job: &DecryptV1Job) -> Result<Plaintext, OpError> {
    open(&aad_v1(&job.context, &job.binding_value), &job.ciphertext[12..])
}

fn encrypt(job: &EncryptJob) -> Vec<u8> {
    let under = Under {
        purpose: job.purpose,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context: &job.context,
        binding_value: &job.binding_value,
        aad: &job.aad,
    };
    seal(&under, &job.plaintext)
}

fn rewrap(job: &RewrapJob) -> Result<Vec<u8>, OpError> {
    let (purpose, plaintext, context, aad) = match &job.from {
        Ciphertext::V2(from) => (from.header.purpose, open_v2(from)?, &from.context, &from.aad[..]),
        Ciphertext::V1(from) => (Purpose::Data, open_v1(from)?, &from.context, &b""[..]),
    };
    let under = Under {
        purpose,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context,
        binding_value: &job.binding_value,
        aad,
    };
    Ok(seal(&under, &plaintext))
}

fn data_key(job: &DataKeyJob) -> Output {
    let plaintext = Plaintext::new(vec![3; job.size.bytes()]);
    let under = Under {
        purpose: Purpose::DataKey,
        binding: job.binding,
        key_uid: job.key_uid,
        version: job.version,
        context: &job.context,
        binding_value: &job.binding_value,
        aad: &job.aad,
    };
    Output::DataKey {
        envelope: seal(&under, &plaintext),
        plaintext: job.plaintext.then_some(plaintext),
    }
}

fn perform(work: Work) -> Result<Output, OpError> {
    match work {
        Work::Encrypt(job) => Ok(Output::Envelope(encrypt(&job))),
        Work::DecryptV2(job) => open_v2(&job).map(Output::Plaintext),
        Work::DecryptV1(job) => open_v1(&job).map(Output::Plaintext),
        Work::Rewrap(job) => rewrap(&job).map(Output::Envelope),
        Work::DataKey(job) => Ok(data_key(&job)),
    }
}

fn perform_if(in_time: bool, work: Work) -> Result<Output, OpError> {
    if in_time {
        perform(work)
    } else {
        Err(OpError::NotBegun)
    }
}

/// Of `Trading`, with the associated data `a`.
pub(in crate::http::tests) fn sealed_under(
    context: &str,
    (key, version): (u8, u32),
    purpose: Purpose,
    plaintext: &[u8],
) -> Vec<u8> {
    let under = Under {
        purpose,
        binding: Binding::Shared,
        key_uid: uid(key),
        version,
        context,
        binding_value: "Trading",
        aad: b"a",
    };
    seal(&under, &Plaintext::new(plaintext.to_vec()))
}

pub(in crate::http::tests) fn envelope_of_unknown_key(version: u32) -> Vec<u8> {
    envelope_of_key(0xee, version)
}

pub(in crate::http::tests) fn envelope_of_key(uid: u8, version: u32) -> Vec<u8> {
    let mut out = Header {
        purpose: Purpose::Data,
        binding: Binding::Shared,
        key_uid: KeyUid::from_bytes([uid; 16]),
        version,
        iv: [0; 12],
    }
    .encode();
    out.extend_from_slice(&[0; TAG_LEN]);
    out
}

impl FakeToken {
    pub(in crate::http::tests) fn trouble(&self, trouble: Option<Trouble>) {
        *self.trouble.lock().unwrap() = trouble;
    }

    /// Jobs that hang are given up.
    pub(in crate::http::tests) fn give_up(&self) {
        self.hanging.lock().unwrap().clear();
    }

    /// How many items each batch had that came so far.
    pub(in crate::http::tests) fn batches(&self) -> Vec<usize> {
        self.batches.lock().unwrap().clone()
    }

    /// How long the caller of the last batch waits.
    pub(in crate::http::tests) fn until(&self) -> Option<Instant> {
        *self.until.lock().unwrap()
    }

    /// How many items there is time for.
    fn has_time_for(&self, single: bool) -> usize {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::OutOfTime(_)) if single => 0,
            Some(Trouble::OutOfTime(items)) => items,
            _ => usize::MAX,
        }
    }

    fn when_due(&self, job: impl FnOnce() + Send + 'static) {
        let trouble = *self.trouble.lock().unwrap();
        match trouble {
            Some(Trouble::Slow(time)) => {
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    job();
                });
            }
            _ => job(),
        }
    }

    /// The callback, if the job is to be done now.
    fn take<T: Send + 'static>(&self, done: T) -> Result<Option<T>, OpError> {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::QueueFull) => return Err(OpError::QueueFull),
            Some(Trouble::Hangs) => self.hanging.lock().unwrap().push(Box::new(done)),
            Some(Trouble::Gone) => drop(done),
            _ => return Ok(Some(done)),
        }
        Ok(None)
    }
}

impl TokenOps for FakeToken {
    fn state(&self) -> SlotState {
        match *self.trouble.lock().unwrap() {
            Some(Trouble::Locked) => SlotState::Locked,
            Some(Trouble::Failed) => SlotState::Failed {
                code: "hung",
                reason: "for the test".to_owned(),
            },
            _ => SlotState::Ready,
        }
    }

    fn run(&self, work: Work, _until: Instant, done: OnDone) -> Result<(), OpError> {
        let in_time = self.has_time_for(true) > 0;
        if let Some(done) = self.take(done)? {
            self.when_due(move || done(perform_if(in_time, work)));
        }
        Ok(())
    }

    fn run_batch(&self, works: Vec<Work>, until: Instant, done: OnBatchDone) -> Result<(), OpError> {
        self.batches.lock().unwrap().push(works.len());
        *self.until.lock().unwrap() = Some(until);
        let in_time = self.has_time_for(false);
        if let Some(done) = self.take(done)? {
            let works = works.into_iter().enumerate();
            let outcomes = works.map(move |(place, work)| perform_if(place < in_time, work));
            self.when_due(move || done(outcomes.collect()));
        }
        Ok(())
    }
}
