//! The probes' view: readiness, v1's health document, metrics.

use std::collections::BTreeMap;

use hsm_api::data::{HealthResponse, HealthStatus, KekStatus};
use hsm_core::SlotState;

use super::{NodeView, gauges};
use crate::admin::differences::Differences;
use crate::health::{HealthSource, Readiness, ReadyQuery};
use crate::metrics;

impl HealthSource for NodeView {
    fn readiness(&self, query: &ReadyQuery) -> Readiness {
        Readiness::of(self.checks(query))
    }

    fn v1_health(&self) -> HealthResponse {
        let mut kek_status = BTreeMap::new();
        for (_, keys) in self.parts.ring.load().iter() {
            let open = keys.slot.state() == SlotState::Ready;
            let usable = |held: bool| {
                if held && open {
                    KekStatus::Available
                } else {
                    KekStatus::Unavailable
                }
            };
            kek_status.extend(
                keys.readable
                    .values()
                    .map(|key| (key.key_id.clone(), usable(true))),
            );
            kek_status.extend(
                keys.missing
                    .values()
                    .map(|key| (key.key_id.clone(), usable(false))),
            );
        }
        let hsm_available = self
            .parts
            .slots
            .entries()
            .all(|entry| entry.state() == SlotState::Ready);
        let all = kek_status.values().all(|status| *status == KekStatus::Available);
        let status = if hsm_available && all {
            HealthStatus::Healthy
        } else {
            HealthStatus::Degraded
        };
        HealthResponse {
            status,
            hsm_available,
            kek_status,
        }
    }

    fn render_metrics(&self) -> String {
        let published = self.parts.consensus.published();
        self.counted
            .consensus(&self.parts.consensus.view(), &published.state);
        gauges::store(&self.parts.consensus.control().figures());
        gauges::slots(&self.parts.slots, &self.parts.sync.status());
        gauges::configuration(&Differences::between(&self.parts.seed, &published.state));
        metrics::ready(self.readiness(&ReadyQuery::default()).ready);
        self.parts.metrics.render()
    }
}
