//! `POST /encrypt`: v1's request and answer, encrypted inside the token.

use hsm_api::{ErrorCode, paths};
use hsm_core::envelope::Purpose;
use hsm_core::secrets::Plaintext;
use hsm_core::{EncryptJob, Work};

use super::asking::{Asking, Bound, Ending, Operation, Step, Task, active, count, invocation, ready};
use super::go_base64;
use super::json::{Member, Text};
use super::opening::decode_aad;
use super::problem::ApiError;
use crate::policy::Op;

pub(super) struct Encrypt;

impl Operation<3> for Encrypt {
    const OP: Op = Op::Encrypt;
    const PATH: &'static str = paths::ENCRYPT;
    const V1_FAILED: &'static str = "encryption failed";
    const MEMBERS: [Member; 3] = [
        Member::text("context"),
        Member::text("plaintext"),
        Member::text("aad"),
    ];

    fn prepare(asking: &Asking<'_>, members: &[Text<'_>; 3]) -> Result<Step, ApiError> {
        let [context, plaintext, aad] = members;
        let context = context.as_str();
        asking.authorise(context, Op::Encrypt)?;
        let plaintext = go_base64::decode(plaintext.as_str())
            .ok_or_else(|| ApiError::new(ErrorCode::InvalidBase64Plaintext))?;
        let aad = decode_aad(aad)?;

        let (name, keys) = asking.keys(context)?;
        let active = active(keys)?;
        let may = ready(keys, active).and_then(|()| invocation(active));
        may.inspect_err(|_| count(Op::Encrypt, name.to_arc(), false))?;
        let job = EncryptJob {
            purpose: Purpose::Data,
            key_uid: active.key_uid,
            version: active.version,
            context: name.to_arc(),
            binding: keys.binding,
            binding_value: Bound::to(asking.principal).value(keys.binding),
            aad,
            plaintext: Plaintext::from(plaintext),
        };
        let ending = Ending {
            context: name.to_arc(),
            under: Some(active.clone()),
            named: None,
        };
        Ok(Step::Run(Task::new(&active.slot, Work::Encrypt(job), ending)))
    }
}
