//! Key versions after their time: disabled, enabled, destroyed, spared, cleaned up, and how often they are used.

use axum::extract::{Path, State};
use axum::response::Response;
use hsm_api::ErrorCode;
use hsm_api::admin::{CleanupRequest, DestroyKeyRequest, KeyUseRequest, UndoDestroyRequest};
use raft_store::names::ContextName;

use super::caller::Caller;
use super::unread::Unread;
use super::{AdminState, context_name};
use crate::admin::authorise::Act;
use crate::admin::call::AdminBody;
use crate::admin::views;
use crate::http::ApiError;

/// A version, as a path names it.
type Named = Path<(String, String)>;

/// The context and the number of a version.
fn version((context, number): &(String, String)) -> Result<(ContextName, u32), ApiError> {
    let context = context_name(context)?;
    let number = number.parse().map_err(|_| {
        let detail = format!("version {number:?}: write its number, such as 3");
        ApiError::new(ErrorCode::InvalidArgument).detail(detail)
    })?;
    Ok((context, number))
}

/// A version, for the audit.
fn target((context, number): &(String, String)) -> String {
    format!("{context}/v{number}")
}

pub(super) async fn usage(State(state): State<AdminState>, caller: Caller) -> Result<Response, ApiError> {
    state.read_of_cluster(&caller, Act::KeyUsage, |published| views::usage(&published.state))
}

pub(super) async fn disable(
    State(state): State<AdminState>,
    Path(named): Named,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    state.set_use(&named, false, &caller, unread).await
}

pub(super) async fn enable(
    State(state): State<AdminState>,
    Path(named): Named,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    state.set_use(&named, true, &caller, unread).await
}

impl AdminState {
    async fn set_use(
        &self,
        named: &(String, String),
        enable: bool,
        caller: &Caller,
        unread: Unread,
    ) -> Result<Response, ApiError> {
        let act = if enable { Act::KeyEnable } else { Act::KeyDisable };
        let target = target(named);
        let request: KeyUseRequest = self.receive(caller, act, &target, unread).await?;
        let (context, version) = version(named)?;
        let body = AdminBody::SetKeyUse {
            context,
            version,
            enable,
        };
        self.change(caller, body, &request, &target).await
    }
}

pub(super) async fn destroy(
    State(state): State<AdminState>,
    Path(named): Named,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let target = target(&named);
    let request: DestroyKeyRequest = state.receive(&caller, Act::KeyDestroy, &target, unread).await?;
    let (context, version) = version(&named)?;
    let body = AdminBody::DestroyKey {
        context,
        version,
        wait_ms: request.wait_seconds.map(|seconds| seconds.saturating_mul(1000)),
        override_recent_use: request.override_recent_use,
    };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn undo_destroy(
    State(state): State<AdminState>,
    Path(named): Named,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let target = target(&named);
    let request: UndoDestroyRequest = state
        .receive(&caller, Act::KeyUndoDestroy, &target, unread)
        .await?;
    let (context, version) = version(&named)?;
    let body = AdminBody::UndoDestroy { context, version };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn release(
    State(state): State<AdminState>,
    Path(named): Named,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let target = target(&named);
    let request: KeyUseRequest = state.receive(&caller, Act::KeyRelease, &target, unread).await?;
    let (context, version) = version(&named)?;
    let body = AdminBody::ReleaseKey { context, version };
    state.change(&caller, body, &request, &target).await
}

pub(super) async fn clean_up(
    State(state): State<AdminState>,
    caller: Caller,
    unread: Unread,
) -> Result<Response, ApiError> {
    let request: CleanupRequest = state.receive(&caller, Act::KeyCleanup, "", unread).await?;
    let context = request.context.as_deref().map(context_name).transpose()?;
    let target = request.context.clone().unwrap_or_default();
    let body = AdminBody::Cleanup {
        context,
        dry_run: request.dry_run,
    };
    state.change(&caller, body, &request, &target).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_a_context_and_a_number() {
        let named = |context: &str, number: &str| (context.to_owned(), number.to_owned());
        let (context, number) = version(&named("exchange-key", "3")).unwrap();
        assert_eq!((context.as_str(), number), ("exchange-key", 3));
        assert_eq!(target(&named("exchange-key", "3")), "exchange-key/v3");
        for (context, number) in [("exchange-key", "v3"), ("exchange-key", "-1"), ("../x", "3")] {
            let error = version(&named(context, number)).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
        }
    }
}
