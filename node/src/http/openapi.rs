//! The description of this API, as it is checked in. Tests here compare it with the routes, those of `hsm-api` with
//! the types and the error codes.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// OpenAPI 3.1.
pub(super) const DOCUMENT: &str = include_str!("../../../docs/openapi.json");

pub(super) async fn show() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}
