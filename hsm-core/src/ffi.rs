//! Token calls that `cryptoki` 0.12.1 cannot make: it has no attribute for
//! `CKA_UNWRAP_TEMPLATE` and no way to read one back, asks for a length before each encryption,
//! and takes PINs as copies. This is the only module that may use `unsafe`; it holds no policy
//! and must hand no pointer outside.
//!
//! Why the calls are sound, once for all of them:
//! * The function pointers come from `C_GetFunctionList` of a library that stays loaded as long
//!   as [`Raw`] lives; the loader counts references, so it is the very library that `cryptoki`
//!   initialised, and session handles made by either are the same handles.
//! * Every pointer argument is made from a reference that outlives the call, with the length of
//!   the buffer behind it. PKCS#11 functions keep none of them after returning, except `*Init`
//!   functions, for which SoftHSM and the standard copy the mechanism's parameters.
//! * `*mut` is what the C headers say for inputs too; tokens write to output buffers only
//!   (PKCS#11 2.40, 5.1 and the conventions of section 5.2).
//! * Handles are plain numbers: a stale one makes the token return an error.

#![allow(unsafe_code)]

use std::path::Path;
use std::ptr;

use cryptoki::session::Session;
use cryptoki_sys::{
    self as sys, CK_ATTRIBUTE, CK_ATTRIBUTE_TYPE, CK_FUNCTION_LIST, CK_OBJECT_HANDLE, CK_SLOT_ID, CK_ULONG,
    CK_USER_TYPE,
};
use zeroize::Zeroizing;

use crate::attribute::Attr;
use crate::error::CallError;
use crate::marshal::{
    Marshalled, Mech, bounded, gcm_mechanism, gcm_params, input, length, mechanism, oaep_params,
};
use crate::return_codes::{Ckr, accept_partial};
use crate::secrets::Pin;

/// Handle of an object. Meaningful only while the session that made it, or the login, lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Obj(CK_OBJECT_HANDLE);

/// An attribute as read: `None` if the object has none, or the token will not reveal it.
pub(crate) type Read = Option<Zeroizing<Vec<u8>>>;

/// Largest attribute that is read (an RSA-8192 modulus), and largest wrapped key.
const READ_CAPACITY: usize = 1024;
/// Handles fetched by one `C_FindObjects`.
const FIND_BATCH: usize = 512;
/// Flags an unwrap template may hold when read back; ours hold four.
const TEMPLATE_CAPACITY: usize = 32;
/// `C_InitToken` takes the label padded with blanks.
pub(crate) const LABEL_LEN: usize = 32;

/// The function list of a loaded module.
pub(crate) struct Raw {
    list: CK_FUNCTION_LIST,
    /// Keeps the library, and so every pointer in `list`, where it is.
    _library: sys::Pkcs11,
}

/// Calls `$name` and turns what it returns into a `Result<(), CallError>`.
macro_rules! call {
    ($raw:expr, $name:ident ( $($argument:expr),* $(,)? )) => {
        match $raw.list.$name {
            None => Err(CallError {
                call: stringify!($name),
                code: Ckr(sys::CKR_FUNCTION_NOT_SUPPORTED),
            }),
            Some(function) => {
                // SAFETY: see the module's comment.
                let code = unsafe { function($($argument),*) };
                if code == sys::CKR_OK {
                    Ok(())
                } else {
                    Err(CallError { call: stringify!($name), code: Ckr(code) })
                }
            }
        }
    };
}

impl Raw {
    /// Opens the library a second time, next to `cryptoki`'s own handle on it.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        // SAFETY: loading runs the library's constructors. `cryptoki` has just loaded the same
        // file, so they have run already.
        let library = unsafe { sys::Pkcs11::new(path) }.map_err(|error| error.to_string())?;
        let get = match &library.C_GetFunctionList {
            Ok(get) => *get,
            Err(error) => return Err(error.to_string()),
        };
        let mut list: *mut CK_FUNCTION_LIST = ptr::null_mut();
        // SAFETY: C_GetFunctionList may be called at any time and only writes the pointer.
        let code = unsafe { get(&raw mut list) };
        if code != sys::CKR_OK || list.is_null() {
            return Err(format!("C_GetFunctionList returned {} and no list", Ckr(code)));
        }
        // SAFETY: the module vouches for the list, which lives as long as the library.
        let list = unsafe { *list };
        Ok(Self {
            list,
            _library: library,
        })
    }

    pub(crate) fn init_token(
        &self,
        slot: CK_SLOT_ID,
        so_pin: &Pin,
        label: &[u8; LABEL_LEN],
    ) -> Result<(), CallError> {
        let pin = so_pin.expose().as_bytes();
        call!(self, C_InitToken(slot, input(pin), length(pin), input(label)))
    }

    pub(crate) fn init_pin(&self, session: &Session, pin: &Pin) -> Result<(), CallError> {
        let pin = pin.expose().as_bytes();
        call!(self, C_InitPIN(session.handle(), input(pin), length(pin)))
    }

    pub(crate) fn login(&self, session: &Session, user: CK_USER_TYPE, pin: &Pin) -> Result<(), CallError> {
        let pin = pin.expose().as_bytes();
        call!(self, C_Login(session.handle(), user, input(pin), length(pin)))
    }

    pub(crate) fn logout(&self, session: &Session) -> Result<(), CallError> {
        call!(self, C_Logout(session.handle()))
    }

    pub(crate) fn create(&self, session: &Session, template: &[Attr]) -> Result<Obj, CallError> {
        let mut template = Marshalled::new(template);
        let mut made = 0;
        call!(
            self,
            C_CreateObject(session.handle(), template.ptr(), template.len(), &raw mut made)
        )?;
        Ok(Obj(made))
    }

    pub(crate) fn copy(&self, session: &Session, object: Obj, changes: &[Attr]) -> Result<Obj, CallError> {
        let mut changes = Marshalled::new(changes);
        let mut made = 0;
        call!(
            self,
            C_CopyObject(
                session.handle(),
                object.0,
                changes.ptr(),
                changes.len(),
                &raw mut made
            )
        )?;
        Ok(Obj(made))
    }

    pub(crate) fn destroy(&self, session: &Session, object: Obj) -> Result<(), CallError> {
        call!(self, C_DestroyObject(session.handle(), object.0))
    }

    /// Every object that matches, token and session objects alike unless `template` says.
    pub(crate) fn find(&self, session: &Session, template: &[Attr]) -> Result<Vec<Obj>, CallError> {
        let mut template = Marshalled::new(template);
        call!(
            self,
            C_FindObjectsInit(session.handle(), template.ptr(), template.len())
        )?;
        let mut found = Vec::new();
        let outcome = loop {
            let mut batch: [CK_OBJECT_HANDLE; FIND_BATCH] = [0; FIND_BATCH];
            let mut count: CK_ULONG = 0;
            let handles = batch.as_mut_ptr();
            let step = call!(
                self,
                C_FindObjects(session.handle(), handles, FIND_BATCH as CK_ULONG, &raw mut count)
            );
            if let Err(error) = step {
                break Err(error);
            }
            let count = bounded(count, FIND_BATCH);
            found.extend(batch.iter().take(count).copied().map(Obj));
            if count < FIND_BATCH {
                break Ok(());
            }
        };
        // Without it the session would answer CKR_OPERATION_ACTIVE from now on.
        let closed = call!(self, C_FindObjectsFinal(session.handle()));
        outcome.and(closed).map(|()| found)
    }

    /// Reads several attributes in one call; those that are missing, sensitive or longer than
    /// 1,024 bytes are `None`.
    pub(crate) fn read(
        &self,
        session: &Session,
        object: Obj,
        kinds: &[CK_ATTRIBUTE_TYPE],
    ) -> Result<Vec<Read>, CallError> {
        let mut buffers: Vec<Zeroizing<Vec<u8>>> = kinds
            .iter()
            .map(|_| Zeroizing::new(vec![0; READ_CAPACITY]))
            .collect();
        let mut template: Vec<CK_ATTRIBUTE> = kinds
            .iter()
            .zip(&mut buffers)
            .map(|(kind, buffer)| CK_ATTRIBUTE {
                type_: *kind,
                pValue: buffer.as_mut_ptr().cast(),
                ulValueLen: READ_CAPACITY as CK_ULONG,
            })
            .collect();
        let count = template.len() as CK_ULONG;
        let outcome = call!(
            self,
            C_GetAttributeValue(session.handle(), object.0, template.as_mut_ptr(), count)
        );
        accept_partial(outcome)?;
        let lengths: Vec<CK_ULONG> = template.iter().map(|attribute| attribute.ulValueLen).collect();
        Ok(buffers
            .into_iter()
            .zip(lengths)
            .map(|(mut buffer, length)| {
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= READ_CAPACITY)?;
                buffer.truncate(length);
                Some(buffer)
            })
            .collect())
    }

    /// Reads an unwrap template; `None` as the value of what is not a flag. An object without
    /// one gives an empty list.
    pub(crate) fn read_template(
        &self,
        session: &Session,
        object: Obj,
        kind: CK_ATTRIBUTE_TYPE,
    ) -> Result<Vec<(CK_ATTRIBUTE_TYPE, Option<bool>)>, CallError> {
        let empty = CK_ATTRIBUTE {
            type_: 0,
            pValue: ptr::null_mut(),
            ulValueLen: 0,
        };
        let mut inner = [empty; TEMPLATE_CAPACITY];
        let mut outer = CK_ATTRIBUTE {
            type_: kind,
            pValue: inner.as_mut_ptr().cast(),
            ulValueLen: size_of_val(&inner) as CK_ULONG,
        };
        // The first call, without inner buffers, fills in types and lengths (2.40, 5.7).
        let handle = session.handle();
        accept_partial(call!(
            self,
            C_GetAttributeValue(handle, object.0, &raw mut outer, 1)
        ))?;
        if outer.ulValueLen == sys::CK_UNAVAILABLE_INFORMATION {
            return Ok(Vec::new());
        }
        let count = bounded(outer.ulValueLen, size_of_val(&inner)) / size_of::<CK_ATTRIBUTE>();
        let mut values = [0_u8; TEMPLATE_CAPACITY];
        let mut is_flag = [false; TEMPLATE_CAPACITY];
        let mut spare = [0_u8; READ_CAPACITY];
        for (index, attribute) in inner.iter_mut().take(count).enumerate() {
            is_flag[index] = attribute.ulValueLen == 1;
            if is_flag[index] {
                attribute.pValue = (&raw mut values[index]).cast();
            } else {
                // Not ours: give it room, and report that it is no flag.
                attribute.pValue = spare.as_mut_ptr().cast();
                attribute.ulValueLen = READ_CAPACITY as CK_ULONG;
            }
        }
        outer.ulValueLen = (count * size_of::<CK_ATTRIBUTE>()) as CK_ULONG;
        if count > 0 {
            accept_partial(call!(
                self,
                C_GetAttributeValue(handle, object.0, &raw mut outer, 1)
            ))?;
        }
        Ok((0..count)
            .map(|index| (inner[index].type_, is_flag[index].then(|| values[index] != 0)))
            .collect())
    }

    pub(crate) fn generate_key(
        &self,
        session: &Session,
        mech: Mech,
        template: &[Attr],
    ) -> Result<Obj, CallError> {
        let mut oaep = oaep_params(mech);
        let mut mechanism = mechanism(mech, &mut oaep);
        let mut template = Marshalled::new(template);
        let mut made = 0;
        call!(
            self,
            C_GenerateKey(
                session.handle(),
                &raw mut mechanism,
                template.ptr(),
                template.len(),
                &raw mut made
            )
        )?;
        Ok(Obj(made))
    }

    /// Public and private key, in this order.
    pub(crate) fn generate_key_pair(
        &self,
        session: &Session,
        mech: Mech,
        public: &[Attr],
        private: &[Attr],
    ) -> Result<(Obj, Obj), CallError> {
        let mut oaep = oaep_params(mech);
        let mut mechanism = mechanism(mech, &mut oaep);
        let (mut public, mut private) = (Marshalled::new(public), Marshalled::new(private));
        let (mut public_made, mut private_made) = (0, 0);
        call!(
            self,
            C_GenerateKeyPair(
                session.handle(),
                &raw mut mechanism,
                public.ptr(),
                public.len(),
                private.ptr(),
                private.len(),
                &raw mut public_made,
                &raw mut private_made
            )
        )?;
        Ok((Obj(public_made), Obj(private_made)))
    }

    pub(crate) fn wrap(
        &self,
        session: &Session,
        mech: Mech,
        wrapping: Obj,
        key: Obj,
    ) -> Result<Zeroizing<Vec<u8>>, CallError> {
        let mut oaep = oaep_params(mech);
        let mut mechanism = mechanism(mech, &mut oaep);
        let mut wrapped = Zeroizing::new(vec![0_u8; READ_CAPACITY]);
        let mut length = READ_CAPACITY as CK_ULONG;
        let out = wrapped.as_mut_ptr();
        call!(
            self,
            C_WrapKey(
                session.handle(),
                &raw mut mechanism,
                wrapping.0,
                key.0,
                out,
                &raw mut length
            )
        )?;
        wrapped.truncate(bounded(length, READ_CAPACITY));
        Ok(wrapped)
    }

    pub(crate) fn unwrap(
        &self,
        session: &Session,
        mech: Mech,
        unwrapping: Obj,
        wrapped: &[u8],
        template: &[Attr],
    ) -> Result<Obj, CallError> {
        let mut oaep = oaep_params(mech);
        let mut mechanism = mechanism(mech, &mut oaep);
        let mut template = Marshalled::new(template);
        let mut made = 0;
        call!(
            self,
            C_UnwrapKey(
                session.handle(),
                &raw mut mechanism,
                unwrapping.0,
                input(wrapped),
                length(wrapped),
                template.ptr(),
                template.len(),
                &raw mut made
            )
        )?;
        Ok(Obj(made))
    }

    /// One AES-GCM encryption with a 128-bit tag. `aad` must not be empty (SoftHSM 2.6.1 reads
    /// its first byte) and `out` has to be 32 bytes longer than `plaintext`. Returns the length
    /// of ciphertext and tag.
    pub(crate) fn gcm_encrypt(
        &self,
        session: &Session,
        key: Obj,
        iv: &[u8],
        aad: &[u8],
        plaintext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CallError> {
        let mut params = gcm_params(iv, aad);
        let mut mechanism = gcm_mechanism(&mut params);
        call!(self, C_EncryptInit(session.handle(), &raw mut mechanism, key.0))?;
        let mut written = length(out);
        call!(
            self,
            C_Encrypt(
                session.handle(),
                input(plaintext),
                length(plaintext),
                out.as_mut_ptr(),
                &raw mut written
            )
        )?;
        Ok(bounded(written, out.len()))
    }

    /// One AES-GCM decryption; lengths as for [`Raw::gcm_encrypt`]. Returns the length of the
    /// plaintext.
    pub(crate) fn gcm_decrypt(
        &self,
        session: &Session,
        key: Obj,
        iv: &[u8],
        aad: &[u8],
        ciphertext: &[u8],
        out: &mut [u8],
    ) -> Result<usize, CallError> {
        let mut params = gcm_params(iv, aad);
        let mut mechanism = gcm_mechanism(&mut params);
        call!(self, C_DecryptInit(session.handle(), &raw mut mechanism, key.0))?;
        let mut written = length(out);
        call!(
            self,
            C_Decrypt(
                session.handle(),
                input(ciphertext),
                length(ciphertext),
                out.as_mut_ptr(),
                &raw mut written
            )
        )?;
        Ok(bounded(written, out.len()))
    }
}
