//! openraft's own suite against the production store type.

use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use raft_store::TypeConfig;
use raft_store::storage::{LogStore, StateMachine};

use crate::common::open;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, StateMachine), StorageError<u64>> {
        let dir = tempfile::tempdir().unwrap();
        let opened = open(dir.path());
        Ok((dir, opened.log, opened.machine))
    }
}

#[test]
fn openrafts_storage_suite_passes_on_the_production_store() {
    Suite::test_all(Builder).unwrap();
}
