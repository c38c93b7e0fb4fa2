//! Templates and mechanisms in the layout of the C headers. Only builds values that contain
//! pointers; following them is left to `ffi`, so nothing here is unsafe.

use std::ffi::c_void;
use std::ptr;

use cryptoki_sys::{
    self as sys, CK_ATTRIBUTE, CK_GCM_PARAMS, CK_MECHANISM, CK_RSA_PKCS_OAEP_PARAMS, CK_ULONG,
};

use crate::attribute::{Attr, Value};
use crate::profile::OaepHash;

/// Mechanisms of control operations. AES-GCM has calls of its own.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Mech {
    AesKeyGen,
    RsaKeyPairGen,
    AesKeyWrap,
    RsaOaep(OaepHash),
}

/// A template as C wants it; points into the attributes it was made from.
pub(crate) struct Marshalled<'a> {
    flat: Vec<CK_ATTRIBUTE>,
    /// What `CKA_UNWRAP_TEMPLATE` entries of `flat` point to.
    _nested: Vec<Vec<CK_ATTRIBUTE>>,
    _attributes: &'a [Attr],
}

impl<'a> Marshalled<'a> {
    pub(crate) fn new(attributes: &'a [Attr]) -> Self {
        let mut nested: Vec<Vec<CK_ATTRIBUTE>> = Vec::new();
        let flat = attributes
            .iter()
            .map(|attribute| {
                let (pointer, size): (*mut c_void, usize) = match &attribute.value {
                    Value::Bool(value) => (untyped(value), size_of_val(value)),
                    Value::Ulong(value) => (untyped(value), size_of_val(value)),
                    Value::Bytes(value) => (value.as_ptr().cast_mut().cast(), value.len()),
                    Value::Mechanisms(value) => {
                        (value.as_ptr().cast_mut().cast(), size_of_val(value.as_slice()))
                    }
                    Value::Template(flags) => {
                        let mut inner: Vec<CK_ATTRIBUTE> = flags
                            .iter()
                            .map(|(kind, value)| CK_ATTRIBUTE {
                                type_: *kind,
                                pValue: untyped(value),
                                ulValueLen: size_of_val(value) as CK_ULONG,
                            })
                            .collect();
                        let place = (inner.as_mut_ptr().cast(), size_of_val(inner.as_slice()));
                        // Moving the Vec leaves its elements where they are.
                        nested.push(inner);
                        place
                    }
                };
                CK_ATTRIBUTE {
                    type_: attribute.kind,
                    pValue: pointer,
                    ulValueLen: size as CK_ULONG,
                }
            })
            .collect();
        Self {
            flat,
            _nested: nested,
            _attributes: attributes,
        }
    }

    pub(crate) fn ptr(&mut self) -> *mut CK_ATTRIBUTE {
        self.flat.as_mut_ptr()
    }

    pub(crate) fn len(&self) -> CK_ULONG {
        self.flat.len() as CK_ULONG
    }
}

/// `bool` is one byte of 0 or 1, as `CK_BBOOL` wants; numbers are `CK_ULONG` already.
fn untyped<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

pub(crate) fn input(bytes: &[u8]) -> *mut u8 {
    bytes.as_ptr().cast_mut()
}

pub(crate) fn length(bytes: &[u8]) -> CK_ULONG {
    bytes.len() as CK_ULONG
}

/// A length a module reported, never beyond the buffer it was given.
pub(crate) fn bounded(reported: CK_ULONG, capacity: usize) -> usize {
    usize::try_from(reported).unwrap_or(capacity).min(capacity)
}

pub(crate) fn gcm_params(iv: &[u8], aad: &[u8]) -> CK_GCM_PARAMS {
    CK_GCM_PARAMS {
        pIv: input(iv),
        ulIvLen: length(iv),
        ulIvBits: length(iv) * 8,
        pAAD: input(aad),
        ulAADLen: length(aad),
        ulTagBits: 128,
    }
}

pub(crate) fn gcm_mechanism(params: &mut CK_GCM_PARAMS) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism: sys::CKM_AES_GCM,
        pParameter: ptr::from_mut(params).cast(),
        ulParameterLen: size_of::<CK_GCM_PARAMS>() as CK_ULONG,
    }
}

pub(crate) fn oaep_params(mech: Mech) -> CK_RSA_PKCS_OAEP_PARAMS {
    let (hash, mgf) = match mech {
        Mech::RsaOaep(OaepHash::Sha256) => (sys::CKM_SHA256, sys::CKG_MGF1_SHA256),
        _ => (sys::CKM_SHA_1, sys::CKG_MGF1_SHA1),
    };
    CK_RSA_PKCS_OAEP_PARAMS {
        hashAlg: hash,
        mgf,
        source: sys::CKZ_DATA_SPECIFIED,
        pSourceData: ptr::null_mut(),
        ulSourceDataLen: 0,
    }
}

pub(crate) fn mechanism(mech: Mech, oaep: &mut CK_RSA_PKCS_OAEP_PARAMS) -> CK_MECHANISM {
    let plain = |mechanism| CK_MECHANISM {
        mechanism,
        pParameter: ptr::null_mut(),
        ulParameterLen: 0,
    };
    match mech {
        Mech::AesKeyGen => plain(sys::CKM_AES_KEY_GEN),
        Mech::RsaKeyPairGen => plain(sys::CKM_RSA_PKCS_KEY_PAIR_GEN),
        Mech::AesKeyWrap => plain(sys::CKM_AES_KEY_WRAP),
        Mech::RsaOaep(_) => CK_MECHANISM {
            mechanism: sys::CKM_RSA_PKCS_OAEP,
            pParameter: ptr::from_mut(oaep).cast(),
            ulParameterLen: size_of::<CK_RSA_PKCS_OAEP_PARAMS>() as CK_ULONG,
        },
    }
}
