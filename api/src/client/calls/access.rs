//! The calls about access control and revocations.

use std::time::Duration;

use super::{MUTATION, Mutation};
use crate::admin::{
    AclAnswer, AclDocument, AclQuestion, RevocationsPage, RevocationsResponse, RevokeCrlRequest,
    RevokeCrlResponse, RevokeRequest, RevokeResponse, SetAclRequest, SetAclResponse, UnrevokeRequest,
    UnrevokeResponse,
};
use crate::client::{Answer, Client, ClientError};
use crate::paths;

/// A list of a large CA becomes hundreds of changes.
const CRL: Duration = Duration::from_secs(120);

/// `path?name=value&…`, of what is given.
fn with_query<const N: usize>(path: &str, members: [(&str, Option<&str>); N]) -> String {
    let mut out = path.to_owned();
    let mut separator = '?';
    for (name, value) in members {
        let Some(value) = value else { continue };
        out.push(separator);
        out.push_str(name);
        out.push('=');
        out.push_str(&paths::encode_segment(value));
        separator = '&';
    }
    out
}

impl Client {
    /// Access control, with the digest that names it.
    pub async fn acl(&self) -> Result<Answer<AclDocument>, ClientError> {
        self.get(paths::ACL).await
    }

    /// Puts other access control in the place of the one that its digest names. For the key see
    /// [`Client::create_kek`].
    pub async fn set_acl(
        &self,
        request: &SetAclRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<SetAclResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::ACL,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, request).await
    }

    /// Whether somebody may do something, by the rules of the node that answers.
    pub async fn test_acl(&self, question: &AclQuestion) -> Result<Answer<AclAnswer>, ClientError> {
        let path = with_query(
            paths::ACL_TEST,
            [
                ("ou", question.ou.as_deref()),
                ("cn", question.cn.as_deref()),
                ("issuer", question.issuer.as_deref()),
                ("context", Some(question.context.as_str())),
                ("operation", Some(question.operation.as_str())),
            ],
        );
        self.get(&path).await
    }

    /// Revokes. Doing it twice is doing it once.
    pub async fn revoke(&self, request: &RevokeRequest) -> Result<Answer<RevokeResponse>, ClientError> {
        self.mutate(once(paths::REVOCATIONS, MUTATION), request).await
    }

    /// Revokes what a certificate revocation list names. One that was not added whole goes on where it stopped.
    pub async fn revoke_crl(
        &self,
        request: &RevokeCrlRequest,
    ) -> Result<Answer<RevokeCrlResponse>, ClientError> {
        self.mutate(once(paths::REVOCATIONS_CRL, CRL), request).await
    }

    /// Takes a revocation back.
    pub async fn unrevoke(&self, request: &UnrevokeRequest) -> Result<Answer<UnrevokeResponse>, ClientError> {
        self.mutate(once(paths::REVOCATIONS_REMOVE, MUTATION), request)
            .await
    }

    /// One page of what is revoked.
    pub async fn revocations(
        &self,
        page: &RevocationsPage,
    ) -> Result<Answer<RevocationsResponse>, ClientError> {
        let path = with_query(paths::REVOCATIONS, [("after", page.after.as_deref())]);
        self.get(&path).await
    }
}

/// A change that is safe to repeat under any key.
fn once(path: &str, limit: Duration) -> Mutation<'_> {
    Mutation {
        path,
        idempotency_key: None,
        limit,
        first_endpoint_only: false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_holds_what_is_given_and_is_encoded() {
        let members = [("ou", Some("R&D, 1")), ("cn", None), ("context", Some("2fa"))];
        assert_eq!(with_query("/p", members), "/p?ou=R%26D%2C%201&context=2fa");
        assert_eq!(with_query("/p", [("after", None)]), "/p");
    }
}
