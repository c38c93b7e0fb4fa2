//! Says that lines were lost. What is said of that is never counted as lost itself: it goes to the place that loses lines
//! too, and would be said of, and lost, for ever.

use super::epoch;
use super::streams::Streams;

/// Lines from here are not counted.
pub(super) const MODULE: &str = module_path!();

/// Says of each place if it has lost lines since that was last said. Numbers count from the start. What no place has taken
/// is said again the next time.
pub(super) fn say(streams: &Streams) {
    for place in streams.all() {
        if let Some(audit_lost) = place.more_audit_dropped() {
            let (name, why) = (place.name(), place.why_dropped());
            tracing::error!(
                target: "audit", epoch = epoch(), audit_lost, place = name, why,
                "audit lines lost since the start"
            );
            if streams.take_unsaid() {
                place.say_audit_dropped_again();
            }
        }
        if let Some(lost) = place.more_dropped() {
            let (name, why) = (place.name(), place.why_dropped());
            tracing::warn!(lost, place = name, why, "log lines lost since the start");
            if streams.take_unsaid() {
                place.say_dropped_again();
            }
        }
    }
}
