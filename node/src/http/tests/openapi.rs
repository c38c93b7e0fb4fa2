//! `docs/openapi.json` against what is registered, and how it is served.

use std::collections::BTreeSet;

use axum::http::Method;

use super::*;
use crate::http::openapi::DOCUMENT;
use crate::http::service::routes;

fn document() -> Value {
    serde_json::from_str(DOCUMENT).unwrap()
}

/// What a path has besides operations.
const ABOUT_A_PATH: [&str; 2] = ["servers", "parameters"];

/// Operations, as `GET /path`.
fn described() -> BTreeSet<String> {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let operations = |(path, item): (&String, &Value)| {
        let methods = item.as_object().unwrap().keys();
        let methods = methods.filter(|key| !ABOUT_A_PATH.contains(&key.as_str()));
        let operations = methods.map(|method| format!("{} {path}", method.to_uppercase()));
        operations.collect::<Vec<_>>()
    };
    paths.iter().flat_map(operations).collect()
}

/// Of the API's listener.
fn of_the_api() -> Vec<(Method, &'static str)> {
    let admin = crate::admin::routes::registered();
    routes().list().iter().cloned().chain(admin).collect()
}

fn registered() -> BTreeSet<String> {
    let all = of_the_api().into_iter().chain(crate::health::registered());
    all.map(|(method, path)| format!("{method} {path}")).collect()
}

#[test]
fn every_route_is_described_and_nothing_else_is() {
    let (described, registered) = (described(), registered());
    let missing: Vec<_> = registered.difference(&described).collect();
    let more: Vec<_> = described.difference(&registered).collect();
    assert!(
        missing.is_empty() && more.is_empty(),
        "docs/openapi.json lacks {missing:?}, and has {more:?}, which is no route"
    );
}

#[test]
fn what_only_the_health_listener_answers_says_where_that_is() {
    let document = document();
    let of_the_api: BTreeSet<&str> = of_the_api().into_iter().map(|(_, path)| path).collect();
    for (path, item) in document["paths"].as_object().unwrap() {
        let own = item["servers"].as_array();
        let elsewhere = !of_the_api.contains(path.as_str());
        assert_eq!(own.is_some(), elsewhere, "servers of {path}");
        for server in own.into_iter().flatten() {
            assert_eq!(server["url"], "http://{host}:{port}", "{path}");
            assert_eq!(server["variables"]["port"]["default"], "8444", "{path}");
        }
        // Nobody shows a certificate there.
        let of_all = item["get"]["security"].as_array();
        assert_eq!(of_all.is_some_and(Vec::is_empty), elsewhere, "security of {path}");
    }
}

#[test]
fn it_has_the_version_of_the_node() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(document()["info"]["version"], version, "in docs/openapi.json");
}

#[tokio::test]
async fn any_certificate_that_is_let_in_gets_it_and_nobody_else() {
    let node = FakeNode::new();
    let get = || Request::get("/openapi.json").body(Body::empty()).unwrap();
    let stranger = principal("nobody", None);
    let answer = send(&node.router(), Some(&stranger), get()).await;
    assert_eq!(answer.response.status(), 200);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("x-hsm-node"), "hsm-node-1");
    assert_eq!(answer.body, DOCUMENT.as_bytes());

    let answer = send(&node.router(), None, get()).await;
    assert_eq!(answer.code(), Some(ErrorCode::NoClientCertificate));
    node.revoke(RevocationKey::CommonName("nobody".to_owned()));
    let answer = send(&node.router(), Some(&stranger), get()).await;
    assert_eq!(answer.code(), Some(ErrorCode::CertificateRevoked));
    let answer = send(
        &node.router(),
        Some(&trading()),
        post("/openapi.json", &json!({})),
    )
    .await;
    assert_eq!(answer.code(), Some(ErrorCode::MethodNotAllowed));
    assert_eq!(answer.header("allow"), "GET,HEAD");
}
