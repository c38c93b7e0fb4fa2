//! The calls of the API, one method each: which path, which headers, how long an attempt may
//! take, and whether another node may be asked.

mod access;
mod rekey;

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
    AdoptKeysRequest, AdoptKeysResponse, CleanupRequest, CleanupResponse, ClusterInitRequest,
    ClusterInitResponse, ClusterStatus, CreateKekRequest, CreateKekResponse, DestroyKeyRequest, JoinRequest,
    JoinResponse, JoinTokenRequest, JoinTokenResponse, KeepNodeRequest, KeepNodeResponse, KeyUsageResponse,
    KeyUseRequest, KeyVersionResponse, ListKeksResponse, MembersResponse, MoveKeyRequest, MoveKeyResponse,
    RemoveNodeRequest, RemoveNodeResponse, RotateRequest, RotateResponse, RotationStatusResponse,
    SlotKeysResponse, SlotStatus, TransferLeaderRequest, TransferLeaderResponse, UndoDestroyRequest,
    UnlockSlotRequest, WhoAmI,
};
use crate::data::{
    BatchResponse, DataKeyBatch, DataKeyRequest, DataKeyResponse, DecryptBatch, DecryptRequest,
    DecryptResponse, EncryptBatch, EncryptRequest, EncryptResponse, RewrapBatch, RewrapRequest,
    RewrapResponse,
};
use crate::{headers, paths};

/// Nodes give a mutation up after 15 s and then say so: wait for that.
const MUTATION: Duration = Duration::from_secs(20);
/// Making a cluster or joining one imports keys; a joining node answers within 60 s. Making key pairs takes
/// seconds each.
const MEMBERSHIP: Duration = Duration::from_secs(75);
/// A node answers a batch of a thousand items on a slow and busy token within 66 s.
const BATCH: Duration = Duration::from_secs(70);
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
        let call = self.data_call(paths::ENCRYPT, body(request, encrypt_size(request))?);
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

    /// Encrypts many. That the call succeeds says nothing of the items: each has a result of its own, and none of
    /// them is repeated.
    pub async fn encrypt_batch(
        &self,
        request: &EncryptBatch,
    ) -> Result<Answer<BatchResponse<EncryptResponse>>, ClientError> {
        let size = batch_size(&request.batch, encrypt_size);
        self.batch(paths::ENCRYPT, body(request, size)?).await
    }

    /// Decrypts many; for their results see [`Client::encrypt_batch`].
    pub async fn decrypt_batch(
        &self,
        request: &DecryptBatch,
    ) -> Result<Answer<BatchResponse<DecryptResponse>>, ClientError> {
        self.batch(paths::DECRYPT, body(request, 0)?).await
    }

    /// Brings a ciphertext under the active key version of its context.
    pub async fn rewrap(&self, request: &RewrapRequest) -> Result<Answer<RewrapResponse>, ClientError> {
        let call = self.data_call(paths::REWRAP, body(request, 0)?);
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.json()?,
            meta: response.meta(attempts),
        })
    }

    /// Brings many under it; for their results see [`Client::encrypt_batch`].
    pub async fn rewrap_batch(
        &self,
        request: &RewrapBatch,
    ) -> Result<Answer<BatchResponse<RewrapResponse>>, ClientError> {
        self.batch(paths::REWRAP, body(request, 0)?).await
    }

    /// Makes a data key. A repetition makes another one, of which the caller learns nothing.
    pub async fn datakey(&self, request: &DataKeyRequest) -> Result<Answer<DataKeyResponse>, ClientError> {
        let call = self.data_call(paths::DATAKEY, body(request, 0)?);
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.secret_json()?,
            meta: response.meta(attempts),
        })
    }

    /// Makes many; for their results see [`Client::encrypt_batch`].
    pub async fn datakey_batch(
        &self,
        request: &DataKeyBatch,
    ) -> Result<Answer<BatchResponse<DataKeyResponse>>, ClientError> {
        self.batch(paths::DATAKEY, body(request, 0)?).await
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

    /// Has a node leave the cluster; returns once it has, or while it waits for its successor. For the key see
    /// [`Client::create_kek`].
    pub async fn remove_node(
        &self,
        node: &str,
        request: &RemoveNodeRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<RemoveNodeResponse>, ClientError> {
        let path = paths::member(node, "remove");
        self.mutate(changes_key(&path, idempotency_key), request).await
    }

    /// Has a node stay that was to leave.
    pub async fn keep_node(
        &self,
        node: &str,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeepNodeResponse>, ClientError> {
        let path = paths::member(node, "keep");
        self.mutate(changes_key(&path, idempotency_key), &KeepNodeRequest {})
            .await
    }

    /// Has another node lead; returns once it does.
    pub async fn transfer_leader(
        &self,
        request: &TransferLeaderRequest,
    ) -> Result<Answer<TransferLeaderResponse>, ClientError> {
        self.mutate(changes_key(paths::CLUSTER_TRANSFER_LEADER, None), request)
            .await
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

    /// Moves a context to another slot; returns once its first version there is active. For the key see
    /// [`Client::create_kek`].
    pub async fn move_key(
        &self,
        context: &str,
        request: &MoveKeyRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<MoveKeyResponse>, ClientError> {
        let path = paths::relocate(context);
        self.mutate(changes_key(&path, idempotency_key), request).await
    }

    /// Takes a retired version out of use: it decrypts nothing until it is enabled. For the key see
    /// [`Client::create_kek`].
    pub async fn disable_key(
        &self,
        context: &str,
        version: u32,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeyVersionResponse>, ClientError> {
        let path = paths::key_version(context, version, "disable");
        self.mutate(changes_key(&path, idempotency_key), &KeyUseRequest {})
            .await
    }

    /// Puts a disabled version back into use.
    pub async fn enable_key(
        &self,
        context: &str,
        version: u32,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeyVersionResponse>, ClientError> {
        let path = paths::key_version(context, version, "enable");
        self.mutate(changes_key(&path, idempotency_key), &KeyUseRequest {})
            .await
    }

    /// Has a retired version destroyed after a wait.
    pub async fn destroy_key(
        &self,
        context: &str,
        version: u32,
        request: &DestroyKeyRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeyVersionResponse>, ClientError> {
        let path = paths::key_version(context, version, "destroy");
        self.mutate(changes_key(&path, idempotency_key), request).await
    }

    /// Takes a destruction back that still waits.
    pub async fn undo_destroy_key(
        &self,
        context: &str,
        version: u32,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeyVersionResponse>, ClientError> {
        let path = paths::key_version(context, version, "undo-destroy");
        self.mutate(changes_key(&path, idempotency_key), &UndoDestroyRequest {})
            .await
    }

    /// Gives an adopted version back to version 1: the nodes remove their copies, and its number is not used again.
    pub async fn release_key(
        &self,
        context: &str,
        version: u32,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<KeyVersionResponse>, ClientError> {
        let path = paths::key_version(context, version, "release");
        self.mutate(changes_key(&path, idempotency_key), &KeyUseRequest {})
            .await
    }

    /// Disables versions that nobody needs any more, by each context's policy.
    pub async fn clean_up_keys(
        &self,
        request: &CleanupRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<CleanupResponse>, ClientError> {
        self.mutate(changes_key(paths::KEYS_CLEANUP, idempotency_key), request)
            .await
    }

    /// Adopts keys that version 1 made, from a token of the first endpoint's node. No other endpoint is asked: it has
    /// other tokens. For the key see [`Client::create_kek`].
    pub async fn adopt_keys(
        &self,
        request: &AdoptKeysRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<AdoptKeysResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::KEYS_ADOPT,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: true,
        };
        self.mutate(mutation, request).await
    }

    /// How often each key version was used, and when last.
    pub async fn key_usage(&self) -> Result<Answer<KeyUsageResponse>, ClientError> {
        self.get(paths::KEYS_USAGE).await
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

    /// What every call says besides.
    fn common(&self, mut headers: HeaderMap) -> HeaderMap {
        let text = self.min_index.map(|index| index.to_string());
        // Two numbers and a dot are always a header's value.
        if let Some(value) = text.and_then(|text| HeaderValue::try_from(text).ok()) {
            headers.insert(headers::X_HSM_MIN_INDEX, value);
        }
        headers
    }

    fn data_call(&self, path: &str, body: Bytes) -> Call {
        Call {
            method: Method::POST,
            path: path.to_owned(),
            headers: self.common(json_headers()),
            body,
            limit: self.request_timeout,
            first_endpoint_only: false,
        }
    }

    async fn batch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Bytes,
    ) -> Result<Answer<BatchResponse<T>>, ClientError> {
        let mut call = self.data_call(path, body);
        call.limit = call.limit.max(BATCH);
        let (response, attempts) = self.run(&call).await?;
        Ok(Answer {
            body: response.secret_json()?,
            meta: response.meta(attempts),
        })
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
            headers: self.common(headers),
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
            headers: self.common(headers),
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

/// A change that any node takes.
fn changes_key<'a>(path: &'a str, idempotency_key: Option<&'a str>) -> Mutation<'a> {
    Mutation {
        path,
        idempotency_key,
        limit: MUTATION,
        first_endpoint_only: false,
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

/// Bytes of texts in a request that holds a plaintext: its buffer must not grow, which would leave a copy behind.
fn encrypt_size(request: &EncryptRequest) -> usize {
    let aad = request.aad.as_ref().map_or(0, |aad| aad.as_slice().len());
    request.context.len() + (request.plaintext.as_slice().len() + aad) * 4 / 3
}

fn batch_size<T>(items: &[T], size: impl Fn(&T) -> usize) -> usize {
    items.iter().map(|item| size(item) + JSON_OVERHEAD).sum()
}

/// Encodes into a buffer that is wiped when the last attempt is over.
fn body(request: &impl Serialize, size: usize) -> Result<Bytes, ClientError> {
    let mut json = Zeroizing::new(Vec::<u8>::with_capacity(size + JSON_OVERHEAD));
    serde_json::to_writer(&mut *json, request).map_err(|error| ClientError::Request(error.to_string()))?;
    Ok(Bytes::from_owner(json))
}
