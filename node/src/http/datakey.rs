//! `POST /datakey`: a fresh key for the caller's own use. It is made where it is encrypted, and nothing but its
//! envelope is kept.

use hsm_api::{ErrorCode, paths};
use hsm_core::{DataKeyJob, DataKeySize, Work};

use super::asking::{Asking, Bound, Ending, Operation, Step, Task, active, count, invocation, ready};
use super::json::{Member, Text};
use super::opening::decode_aad;
use super::problem::ApiError;
use crate::policy::Op;

pub(super) struct DataKey;

impl Operation<4> for DataKey {
    const OP: Op = Op::DataKey;
    const PATH: &'static str = paths::DATAKEY;
    const V1_FAILED: &'static str = "data key failed";
    const MEMBERS: [Member; 4] = [
        Member::text("context"),
        Member::text("aad"),
        Member::scalar("bits"),
        Member::scalar("plaintext"),
    ];

    fn prepare(asking: &Asking<'_>, members: &[Text<'_>; 4]) -> Result<Step, ApiError> {
        let [context, aad, bits, plaintext] = members;
        let context = context.as_str();
        asking.authorise(context, Op::DataKey)?;
        let aad = decode_aad(aad)?;
        let size = size(bits.as_str())?;
        let plaintext = with_plaintext(plaintext.as_str())?;

        let (name, keys) = asking.keys(context)?;
        let active = active(keys)?;
        let may = ready(keys, active).and_then(|()| invocation(active));
        may.inspect_err(|_| count(Op::DataKey, name.to_arc(), false))?;
        let job = DataKeyJob {
            key_uid: active.key_uid,
            version: active.version,
            context: name.to_arc(),
            binding: keys.binding,
            binding_value: Bound::to(asking.principal).value(keys.binding),
            aad,
            size,
            plaintext,
        };
        let ending = Ending {
            context: name.to_arc(),
            under: Some(active.clone()),
            named: None,
        };
        Ok(Step::Run(Task::new(&active.slot, Work::DataKey(job), ending)))
    }
}

fn size(bits: &str) -> Result<DataKeySize, ApiError> {
    match bits {
        "" | "256" => Ok(DataKeySize::Bits256),
        "128" => Ok(DataKeySize::Bits128),
        _ => Err(ApiError::new(ErrorCode::InvalidArgument).detail("bits: expected 256 or 128")),
    }
}

fn with_plaintext(text: &str) -> Result<bool, ApiError> {
    match text {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(ApiError::new(ErrorCode::InvalidArgument).detail("plaintext: expected true or false")),
    }
}
