//! `POST /rewrap`: a ciphertext of any version and format under the active version of its context. The plaintext
//! stays in the slot; where the two keys are in different ones, in this process between two jobs. Administrators and
//! operators may do it for others, and for others from then on; who did that for whom is in the audit.

use hsm_api::{ErrorCode, paths};
use hsm_core::envelope::Binding;
use hsm_core::{RewrapJob, Work};

use super::asking::{Asking, Bound, Ending, Onward, Operation, Step, Task, active, count, invocation, ready};
use super::job::slot_error;
use super::json::{self, Member, NotJson, Text};
use super::named::Named;
use super::opening::{Given, Opening, opening};
use super::problem::ApiError;
use super::resolve::Wanted;
use super::trusted::Via;
use crate::config::ContextName;
use crate::keyring::ContextKeys;
use crate::policy::{Op, Role};

/// Who may name others; administrators may in any case.
pub(super) const NAMERS: &[Role] = &[Role::Operator];

const NAMES: [Member; 2] = [Member::text("ou"), Member::text("cn")];

pub(super) struct Rewrap;

impl Operation<6> for Rewrap {
    const OP: Op = Op::Rewrap;
    const PATH: &'static str = paths::REWRAP;
    const V1_FAILED: &'static str = "rewrap failed";
    const MEMBERS: [Member; 6] = [
        Member::text("context"),
        Member::text("ciphertext"),
        Member::text("key_id"),
        Member::text("aad"),
        Member::raw("principal"),
        Member::raw("rebind"),
    ];

    fn prepare(asking: &Asking<'_>, members: &[Text<'_>; 6]) -> Result<Step, ApiError> {
        let [context, ciphertext, key_id, aad, principal, rebind] = members;
        let context = context.as_str();
        let names = Names {
            principal: names("principal", principal.as_str())?,
            rebind: names("rebind", rebind.as_str())?,
        };
        let given = || Given::read(ciphertext, key_id, aad);
        if names.principal.is_none() && names.rebind.is_none() {
            asking.authorise(context, Op::Rewrap)?;
            return plan(asking, context, given()?, &names, None);
        }
        let named = Box::new(Named::new(context, names.principal(), names.rebind()));
        let given = allowed(asking, context, &names).and_then(|()| given());
        let planned = given.and_then(|given| plan(asking, context, given, &names, Some(named.clone())));
        planned.map_err(|error| {
            named.record(asking, Some(&error));
            error.with_its_line()
        })
    }
}

/// Whom a request names besides the caller.
struct Names<'a> {
    principal: Option<[Text<'a>; 2]>,
    rebind: Option<[Text<'a>; 2]>,
}

fn bound<'n>(names: &'n Option<[Text<'_>; 2]>) -> Option<Bound<'n>> {
    names.as_ref().map(|[ou, cn]| Bound {
        ou: ou.as_str(),
        cn: cn.as_str(),
    })
}

impl Names<'_> {
    fn principal(&self) -> Option<Bound<'_>> {
        bound(&self.principal)
    }

    fn rebind(&self) -> Option<Bound<'_>> {
        bound(&self.rebind)
    }
}

/// Reads one of them. An empty one would be a caller's mistake, and bind to nobody.
fn names<'a>(member: &str, object: &'a str) -> Result<Option<[Text<'a>; 2]>, ApiError> {
    if object.is_empty() {
        return Ok(None);
    }
    let names = json::members(object, &NAMES).map_err(|NotJson| ApiError::new(ErrorCode::InvalidJson))?;
    if names.iter().all(|name| name.as_str().is_empty()) {
        let detail = format!("{member}: ou, cn or both are missing");
        return Err(ApiError::new(ErrorCode::InvalidArgument).detail(detail));
    }
    Ok(Some(names))
}

/// Whoever names the principal needs no mapping: it is not his own data.
fn allowed(asking: &Asking<'_>, context: &str, names: &Names<'_>) -> Result<(), ApiError> {
    // A role's doing: a proxy that shows an operator's certificate, which is no secret, must not have it.
    if asking.request.get::<Via>().is_some() {
        return Err(ApiError::new(ErrorCode::AdminThroughProxy));
    }
    asking.policy.require_role(asking.principal, NAMERS)?;
    if names.principal.is_none() {
        asking.authorise(context, Op::Rewrap)?;
    }
    Ok(())
}

fn plan(
    asking: &Asking<'_>,
    context: &str,
    given: Given<'_>,
    names: &Names<'_>,
    named: Option<Box<Named>>,
) -> Result<Step, ApiError> {
    let (name, keys) = asking.keys(context)?;
    let planned = plan_under(asking, (name, keys), given, names, named);
    planned.inspect_err(|_| count(Op::Rewrap, name.to_arc(), false))
}

fn plan_under(
    asking: &Asking<'_>,
    (name, keys): (&ContextName, &ContextKeys),
    given: Given<'_>,
    names: &Names<'_>,
    mut named: Option<Box<Named>>,
) -> Result<Step, ApiError> {
    let active = active(keys)?;
    let from = names.principal().unwrap_or(Bound::to(asking.principal));
    let to = names.rebind().unwrap_or(from);
    if names.rebind.is_some() {
        check_rebind(keys.binding, to)?;
    }
    let of_others = names.principal.is_some();
    let may_use = |owner: &ContextName| {
        let may = asking
            .policy
            .authorise(asking.principal, owner.as_str(), Op::Rewrap);
        of_others || may.is_ok()
    };
    let opening = opening(asking, (name, keys), given, Wanted::Either, from, may_use)?;
    let ending = |named| Ending {
        context: name.to_arc(),
        under: Some(active.clone()),
        named,
    };
    let (ciphertext, old) = match opening {
        Opening::Known(ciphertext, key) => (ciphertext, key),
        Opening::Above(version) => {
            return Ok(Step::Ask {
                context: name.clone(),
                version,
                ending: ending(named),
            });
        }
    };
    ready(keys, active)?;
    let job = RewrapJob {
        from: ciphertext,
        key_uid: active.key_uid,
        version: active.version,
        binding: keys.binding,
        binding_value: to.value(keys.binding),
    };
    let (work, onward) = if old.slot.name == active.slot.name {
        (Work::Rewrap(job), None)
    } else {
        let (open, reseal) = job.split().map_err(slot_error)?;
        let slot = active.slot.clone();
        (open, Some(Onward { slot, reseal }))
    };
    invocation(active)?;
    if let Some(named) = &mut named {
        named.versions(old.version, active.version);
    }
    Ok(Step::Run(Task {
        onward,
        ..Task::new(&old.slot, work, ending(named))
    }))
}

/// What the context binds to has to be said, or nobody could open the ciphertext.
fn check_rebind(binding: Binding, to: Bound<'_>) -> Result<(), ApiError> {
    let missing = match binding {
        Binding::Shared if to.ou.is_empty() => "rebind: ou is missing, to which this context binds",
        Binding::Private if to.cn.is_empty() => "rebind: cn is missing, to which this context binds",
        Binding::None => "rebind: this context binds to nobody",
        Binding::Shared | Binding::Private => return Ok(()),
    };
    Err(ApiError::new(ErrorCode::InvalidArgument).detail(missing))
}
