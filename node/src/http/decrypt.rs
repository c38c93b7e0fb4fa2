//! `POST /decrypt`: opens envelopes and, for ever, v1's ciphertexts. A data key comes out only where one is asked
//! for.

use hsm_api::{ErrorCode, paths};
use hsm_core::{Ciphertext, Work};

use super::asking::{Asking, Bound, Ending, Operation, Step, Task, count};
use super::json::{Member, Text};
use super::opening::{Given, Opening, opening};
use super::problem::ApiError;
use super::resolve::Wanted;
use crate::config::ContextName;
use crate::policy::Op;

pub(super) struct Decrypt;

impl Operation<5> for Decrypt {
    const OP: Op = Op::Decrypt;
    const PATH: &'static str = paths::DECRYPT;
    const V1_FAILED: &'static str = "decryption failed";
    const MEMBERS: [Member; 5] = [
        Member::text("context"),
        Member::text("ciphertext"),
        Member::text("key_id"),
        Member::text("aad"),
        Member::text("purpose"),
    ];

    fn prepare(asking: &Asking<'_>, members: &[Text<'_>; 5]) -> Result<Step, ApiError> {
        let [context, ciphertext, key_id, aad, purpose] = members;
        let context = context.as_str();
        asking.authorise(context, Op::Decrypt)?;
        let given = Given::read(ciphertext, key_id, aad)?;
        let wanted = wanted(purpose.as_str())?;

        let (name, keys) = asking.keys(context)?;
        let may_use = |owner: &ContextName| {
            let may = asking
                .policy
                .authorise(asking.principal, owner.as_str(), Op::Decrypt);
            may.is_ok()
        };
        let bound = Bound::to(asking.principal);
        let opening = opening(asking, (name, keys), given, wanted, bound, may_use)
            .inspect_err(|_| count(Op::Decrypt, name.to_arc(), false))?;
        let ending = Ending {
            context: name.to_arc(),
            under: None,
            named: None,
        };
        Ok(match opening {
            Opening::Above(version) => Step::Ask {
                context: name.clone(),
                version,
                ending,
            },
            Opening::Known(Ciphertext::V2(job), key) => {
                Step::Run(Task::new(&key.slot, Work::DecryptV2(job), ending))
            }
            Opening::Known(Ciphertext::V1(job), key) => {
                Step::Run(Task::new(&key.slot, Work::DecryptV1(job), ending))
            }
        })
    }
}

fn wanted(purpose: &str) -> Result<Wanted, ApiError> {
    match purpose {
        "" | "data" => Ok(Wanted::Data),
        "datakey" => Ok(Wanted::DataKey),
        _ => Err(ApiError::new(ErrorCode::InvalidArgument).detail("purpose: expected data or datakey")),
    }
}
