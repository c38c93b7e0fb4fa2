//! The calls about replacing transport keys and the replication key.

use super::{MUTATION, Mutation};
use crate::admin::{
    RekeyReplicationRequest, RekeyReplicationResponse, RekeyStatus, RekeyTransportRequest,
    RekeyTransportResponse,
};
use crate::client::{Answer, Client, ClientError};
use crate::paths;

impl Client {
    /// Begins to replace a slot's transport key; [`Client::rekey_status`] says how far that is.
    pub async fn rekey_transport(
        &self,
        request: &RekeyTransportRequest,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<RekeyTransportResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::CLUSTER_REKEY_TRANSPORT,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, request).await
    }

    /// Makes the nodes' other replication key the cluster's, if every node has it.
    pub async fn rekey_replication(
        &self,
        idempotency_key: Option<&str>,
    ) -> Result<Answer<RekeyReplicationResponse>, ClientError> {
        let mutation = Mutation {
            path: paths::CLUSTER_REKEY_REPLICATION,
            idempotency_key,
            limit: MUTATION,
            first_endpoint_only: false,
        };
        self.mutate(mutation, &RekeyReplicationRequest {}).await
    }

    /// Where the replacement of transport keys and of the replication key stands.
    pub async fn rekey_status(&self) -> Result<Answer<RekeyStatus>, ClientError> {
        self.get(paths::CLUSTER_REKEY).await
    }
}
