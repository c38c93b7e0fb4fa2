//! The calls of the API, one method each: which path, which headers, how long an attempt may
//! take, and whether another node may be asked.

use std::time::Duration;

use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method};
use hyper::body::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ulid::Ulid;
use zeroize::Zeroizing;

use super::answer::Answer;
use super::error::ClientError;
use super::transport::Call;
use super::{Client, header_value};
use crate::admin::{
    ClusterInitRequest, ClusterInitResponse, ClusterStatus, CreateKekRequest, CreateKekResponse, JoinRequest,
    JoinResponse, JoinTokenRequest, JoinTokenResponse, ListKeksResponse, MembersResponse, RotateRequest,
    RotateResponse, RotationStatusResponse, SlotKeysResponse, SlotStatus, UnlockSlotRequest, WhoAmI,
};
use crate::data::{DecryptRequest, DecryptResponse, EncryptRequest, EncryptResponse};
use crate::{headers, paths};

/// Nodes give a mutation up after 15 s and then say so: wait for that.
const MUTATION: Duration = Duration::from_secs(20);
/// Making a cluster or joining one imports keys; a joining node answers within 60 s. Making key pairs takes
/// seconds each.
const MEMBERSHIP: Duration = Duration::from_secs(75);
/// Quotes, names and braces of a request.
const JSON_OVERHEAD: usize = 256;

/// A change of the cluster.
struct Mutation<'a> {
    path: &'a str,
    idempotency_key: Option<&'a str>,
    limit: Duration,
    first_endpoint_only: bool,
}

impl Client {
    /// Encrypts.
    pub async fn encrypt(&self, request: &EncryptRequest) -> Result<Answer<EncryptResponse>, ClientError> {
        let aad = request.aad.as_ref().map_or(0, |aad| aad.as_slice().len());
        let size = request.context.len() + (request.plaintext.as_slice().len() + aad) * 4 / 3;
        let call = self.data_call(paths::ENCRYPT, body(request, size)?);
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.json()?,
            meta: response.meta(attempts),
        })
    }

    /// Decrypts.
    pub async fn decrypt(&self, request: &DecryptRequest) -> Result<Answer<DecryptResponse>, ClientError> {
        let size = request.context.len() + request.ciphertext.as_slice().len() * 4 / 3;
        let call = self.data_call(paths::DECRYPT, body(request, size)?);
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.secret_json()?,
            meta: response.meta(attempts),
        })
    }

    /// Makes a cluster of the first endpoint's node. No other endpoint is asked: it would make a
    /// second cluster.
    pub async fn cluster_init(&self) -> Result<Answer<ClusterInitResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::CLUSTER_INIT,
            idempotency_key: None,
            limit: MEMBERSHIP,
            first_endpoint_only: true,
        };
        self.mutate(mutation, &ClusterInitRequest {}).await
    }

    /// The cluster as one node sees it: with several endpoints, the one that answers. Use
    /// [`Client::on`] to choose.
    pub async fn cluster_status(&self) -> Result<Answer<ClusterStatus>, ClientError> {
        self.get(paths::CLUSTER_STATUS).await
    }

    /// All members.
    pub async fn members(&self) -> Result<Answer<MembersResponse>, ClientError> {
        self.get(paths::CLUSTER_MEMBERS).await
    }

    /// Makes a one-time join token.
    pub async fn create_join_token(
        &self,
        request: &JoinTokenRequest,
    ) -> Result<Answer<JoinTokenResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::CLUSTER_TOKENS,
            idempotency_key: None,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, request).await
    }

    /// The first endpoint's node's own public keys, which others encrypt transport keys to. No other endpoint is
    /// asked.
    pub async fn slot_keys(&self) -> Result<Answer<SlotKeysResponse>, ClientError> {
        let limit = self.request_timeout.max(MEMBERSHIP);
        self.run_get(paths::CLUSTER_SLOT_KEYS, limit, true).await
    }

    /// Makes the first endpoint's node join a cluster; returns once it votes. No other endpoint
    /// is asked.
    pub async fn join(&self, request: &JoinRequest) -> Result<Answer<JoinResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::CLUSTER_JOIN,
            idempotency_key: None,
            limit: MEMBERSHIP,
            first_endpoint_only: true,
        };
        self.mutate(mutation, request).await
    }

    /// Creates a KEK. Without a key of the caller's own, a repetition by this call is recognised,
    /// a second call is not.
    pub async fn create_kek(
        &self,
        request: &CreateKekRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<CreateKekResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::KEYS,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, request).await
    }

    /// All contexts and their key versions.
    pub async fn list_keks(&self) -> Result<Answer<ListKeksResponse>, ClientError> {
        self.get(paths::KEYS).await
    }

    /// Rotates a context; returns once the new version is active. For the key see
    /// [`Client::create_kek`].
    pub async fn rotate(
        &self,
        context: &str,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<RotateResponse>, ClientError> {
        let path = paths::rotate(context);
        let mutation = Mutation {
            path: &path,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, &RotateRequest {}).await
    }

    /// Where each context stands in its rotation.
    pub async fn rotation_status(&self) -> Result<Answer<RotationStatusResponse>, ClientError> {
        self.get(paths::ROTATION_STATUS).await
    }

    /// Makes the first endpoint's node open one of its slots now, from its own PIN source. No other
    /// endpoint is asked.
    pub async fn unlock_slot(
        &self,
        slot: &str,
        request: &UnlockSlotRequest,
    ) -> Result<Answer<SlotStatus>, ClientError> {
        let path = paths::unlock_slot(slot);
        let mutation = Mutation {
            path: &path,
            idempotency_key: None,
            limit: MEMBERSHIP,
            first_endpoint_only: true,
        };
        self.mutate(mutation, request).await
    }

    /// Who this client is to the node that answers.
    pub async fn whoami(&self) -> Result<Answer<WhoAmI>, ClientError> {
        self.get(paths::WHOAMI).await
    }

    /// Prometheus text of the node that answers.
    pub async fn metrics(&self) -> Result<Answer<String>, ClientError> {
        let call = Call {
            method: Method::GET,
            path: paths::METRICS.to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            limit: self.request_timeout,
            first_endpoint_only: false,
        };
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.text(),
            meta: response.meta(attempts),
        })
    }

    fn data_call(&self, path: &str, body: Bytes) -> Call {
        Call {
            method: Method::POST,
            path: path.to_owned(),
            headers: json_headers(),
            body,
            limit: self.request_timeout,
            first_endpoint_only: false,
        }
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Answer<T>, ClientError> {
        self.run_get(path, self.request_timeout, false).await
    }

    async fn run_get<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
        first_endpoint_only: bool,
    ) -> Result<Answer<T>, ClientError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, json());
        headers.insert(headers::X_HSM_REQUEST, HeaderValue::from_static("1"));
        let call = Call {
            method: Method::GET,
            path: path.to_owned(),
            headers,
            body: Bytes::new(),
            limit,
            first_endpoint_only,
        };
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.json()?,
            meta: response.meta(attempts),
        })
    }

    async fn mutate<T: DeserializeOwned>(
        &self,
        mutation: Mutation<'_>,
        request: &impl Serialize,
    ) -> Result<Answer<T>, ClientError> {
        let mut headers = json_headers();
        headers.insert(headers::X_HSM_REQUEST, HeaderValue::from_static("1"));
        let key = match mutation.idempotency_key {
            Some(key) => header_value(headers::IDEMPOTENCY_KEY, key)?,
            None => header_value(headers::IDEMPOTENCY_KEY, &Ulid::new().to_string())?,
        };
        headers.insert(headers::IDEMPOTENCY_KEY, key);
        let call = Call {
            method: Method::POST,
            path: mutation.path.to_owned(),
            headers,
            body: body(request, 0)?,
            limit: self.request_timeout.max(mutation.limit),
            first_endpoint_only: mutation.first_endpoint_only,
        };
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.json()?,
            meta: response.meta(attempts),
        })
    }
}

fn json() -> HeaderValue {
    HeaderValue::from_static("application/json")
}

fn json_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_TYPE, json());
    headers.insert(ACCEPT, json());
    headers
}

/// Encodes into a buffer that is wiped when the last attempt is over.
fn body(request: &impl Serialize, size: usize) -> Result<Bytes, ClientError> {
    let mut json = Zeroizing::new(Vec::<u8>::with_capacity(size + JSON_OVERHEAD));
    serde_json::to_writer(&mut *json, request).map_err(|error| ClientError::Request(error.to_string()))?;
    Ok(Bytes::from_owner(json))
}
