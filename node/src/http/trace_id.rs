//! The trace that a request belongs to, by the W3C's `traceparent`: it joins the lines of the nodes to those of
//! whoever called.

use std::sync::Arc;

use axum::http::HeaderMap;

use crate::clock;

/// 16 bytes as 32 lower-case hex digits. An extension of every request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceId(Arc<str>);

impl TraceId {
    /// The caller's, if it sent one `traceparent` that is one, else a new one.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut given = headers.get_all(hsm_api::headers::TRACEPARENT).iter();
        let text = given.next().and_then(|value| value.to_str().ok());
        let text = text.filter(|_| given.next().is_none());
        text.and_then(trace_of)
            .map_or_else(Self::new, |id| Self(Arc::from(id)))
    }

    /// A new one.
    #[must_use]
    #[allow(clippy::new_without_default)] // Two calls give different values.
    pub fn new() -> Self {
        Self(Arc::from(hex::encode(clock::random_id())))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// `version-trace-parent-flags`; later versions may say more after that.
/// <https://www.w3.org/TR/trace-context/#traceparent-header>
fn trace_of(text: &str) -> Option<&str> {
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let whole = version != "00" || parts.next().is_none();
    let is = |part: &str, digits: usize| {
        part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let names_something = |part: &str| part.bytes().any(|b| b != b'0');
    let usable = is(version, 2)
        && version != "ff"
        && is(trace, 32)
        && names_something(trace)
        && is(parent, 16)
        && names_something(parent)
        && is(flags, 2);
    (whole && usable).then_some(trace)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    fn of(values: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append("traceparent", HeaderValue::from_str(value).unwrap());
        }
        TraceId::of(&headers).as_str().to_owned()
    }

    #[test]
    fn a_callers_trace_goes_on() {
        assert_eq!(of(&[&format!("00-{TRACE}-b7ad6b7169203331-01")]), TRACE);
        assert_eq!(
            of(&[&format!("cc-{TRACE}-b7ad6b7169203331-01-what.the.future")]),
            TRACE
        );
    }

    #[test]
    fn what_is_no_trace_is_replaced_by_a_new_one() {
        let good = format!("00-{TRACE}-b7ad6b7169203331-01");
        for bad in [
            "".to_owned(),
            TRACE.to_owned(),
            good.replace(TRACE, &"0".repeat(32)),
            good.replace("b7ad6b7169203331", &"0".repeat(16)),
            good.replace("00-", "ff-"),
            good.to_uppercase(),
            format!("{good}-more"),
            good.replace("-01", "-1"),
            good.replace(TRACE, "../../../../../../etc/passwd....."),
        ] {
            let id = of(&[&bad]);
            assert_ne!(id, TRACE, "{bad}");
            assert!(
                id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()),
                "{id}"
            );
        }
        assert_ne!(of(&[&good, &good]), TRACE, "two of them are none");
        assert_ne!(of(&[]), of(&[]));
    }
}
