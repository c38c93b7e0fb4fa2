//! What keeps a web page from using a person's client certificate: requests of a foreign origin
//! are refused on every route, and admin routes ask for what a page cannot send unasked.

use axum::http::{HeaderMap, Method, Uri, header};
use hsm_api::ErrorCode;

use super::problem::ApiError;

/// Refuses requests that a page of another origin has caused. Clients that are no browsers send
/// neither header.
///
/// # Errors
/// `foreign_origin`.
pub fn same_origin(headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
    let refused =
        |what: &str| Err(ApiError::new(ErrorCode::ForeignOrigin).operator(format!("{what} is foreign")));
    let mut sites = headers.get_all("sec-fetch-site").iter();
    if !sites.all(|site| matches!(site.as_bytes(), b"same-origin" | b"none")) {
        return refused("Sec-Fetch-Site");
    }
    let own = uri
        .authority()
        .map(|authority| authority.as_str())
        .or_else(|| headers.get(header::HOST).and_then(|host| host.to_str().ok()));
    let mut origins = headers.get_all(header::ORIGIN).iter();
    let same = origins.all(|origin| {
        let host = origin
            .to_str()
            .ok()
            .and_then(|text| text.strip_prefix("https://"));
        host.is_some()
            && host
                .zip(own)
                .is_some_and(|(host, own)| host.eq_ignore_ascii_case(own))
    });
    if same { Ok(()) } else { refused("Origin") }
}

/// What admin routes ask for besides: `X-HSM-Request: 1`, and JSON where there is a body.
///
/// # Errors
/// `request_header_missing` or `unsupported_media_type`.
pub fn admin(method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers
        .get(hsm_api::headers::X_HSM_REQUEST)
        .map(|value| value.as_bytes());
    if value != Some(&b"1"[..]) {
        return Err(ApiError::new(ErrorCode::RequestHeaderMissing));
    }
    let has_body = matches!(*method, Method::POST | Method::PUT | Method::PATCH);
    if has_body && !is_json(headers) {
        return Err(ApiError::new(ErrorCode::UnsupportedMediaType));
    }
    Ok(())
}

fn is_json(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.split(';').next())
        .is_some_and(|media| media.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    header::HeaderName::from_static(name),
                    header::HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    fn origin(pairs: &[(&'static str, &'static str)]) -> Result<(), ErrorCode> {
        same_origin(&headers(pairs), &Uri::from_static("/encrypt")).map_err(|error| error.code())
    }

    #[test]
    fn clients_that_are_no_browsers_pass() {
        assert_eq!(origin(&[("host", "hsm:8443")]), Ok(()));
    }

    #[test]
    fn a_page_of_this_node_passes_and_any_other_does_not() {
        let refused = Err(ErrorCode::ForeignOrigin);
        assert_eq!(
            origin(&[("host", "hsm:8443"), ("origin", "https://HSM:8443")]),
            Ok(())
        );
        assert_eq!(
            origin(&[("host", "hsm:8443"), ("sec-fetch-site", "same-origin")]),
            Ok(())
        );
        for (name, value) in [
            ("origin", "https://evil.example"),
            ("origin", "http://hsm:8443"),
            ("origin", "https://hsm"),
            ("origin", "null"),
            ("origin", ""),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert_eq!(
                origin(&[("host", "hsm:8443"), (name, value)]),
                refused,
                "{name}: {value}"
            );
        }
        assert_eq!(origin(&[("origin", "https://hsm:8443")]), refused);
    }

    #[test]
    fn http2_names_the_host_in_the_uri() {
        let headers = headers(&[("origin", "https://hsm:8443")]);
        assert!(same_origin(&headers, &Uri::from_static("https://hsm:8443/encrypt")).is_ok());
    }

    #[test]
    fn admin_routes_want_the_header_and_json() {
        let ask = |method: Method, pairs: &[(&'static str, &'static str)]| {
            admin(&method, &headers(pairs)).map_err(|error| error.code())
        };
        let json = ("content-type", "application/json; charset=utf-8");
        let marked = ("x-hsm-request", "1");
        assert_eq!(ask(Method::POST, &[marked, json]), Ok(()));
        assert_eq!(ask(Method::GET, &[marked]), Ok(()));
        assert_eq!(ask(Method::GET, &[]), Err(ErrorCode::RequestHeaderMissing));
        assert_eq!(
            ask(Method::POST, &[("x-hsm-request", "2"), json]),
            Err(ErrorCode::RequestHeaderMissing)
        );
        for media in ["text/plain", "application/jsonx", "multipart/form-data"] {
            assert_eq!(
                ask(Method::POST, &[marked, ("content-type", media)]),
                Err(ErrorCode::UnsupportedMediaType)
            );
        }
        assert_eq!(ask(Method::PUT, &[marked]), Err(ErrorCode::UnsupportedMediaType));
    }
}
