//! `docs/openapi.json` against this crate: its types, its error codes, its headers. That it has every route is tested
//! where they are registered, in `hsm-node`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checker;
mod samples;

use std::collections::BTreeSet;
use std::path::Path;

use hsm_api::admin::{AclMapping, AclQuestion, RevocationsPage};
use hsm_api::data::{
    BATCH_MAX_ITEMS, BatchResponse, DataKeyResponse, DecryptResponse, EncryptResponse, RewrapResponse,
};
use hsm_api::{ErrorCode, headers, paths};
use serde_json::{Value, json};

use self::checker::{Document, Names, array, object, words};
use self::samples::{mappings, reads, samples, value};

const OPERATIONS: [&str; 4] = ["Encrypt", "Decrypt", "Rewrap", "DataKey"];
/// Types that stand in the document as what they are for each operation.
const GENERIC: [&str; 3] = ["Batch", "BatchResponse", "ItemResult"];
/// Types that are sent as a query.
const QUERIES: [&str; 2] = ["AclQuestion", "RevocationsPage"];
/// What the document names and the types do not.
const NAMED: [&str; 5] = ["Name", "Base64", "KeyVersion", "Operation", "Role"];

/// Reads a type.
type Reads = fn(&Value) -> Result<(), String>;

fn names<'n>(of: impl IntoIterator<Item = &'n str>) -> Names {
    of.into_iter().map(str::to_owned).collect()
}

/// An operation: its path, its method, what is said of it.
type Described<'d> = (&'d str, &'d str, &'d Value);

/// All operations of the API's listener.
fn operations(document: &Document) -> Vec<Described<'_>> {
    operations_of(document, |item| item.get("servers").is_none())
}

/// What the health listener alone answers: paths with servers of their own.
fn probes(document: &Document) -> Vec<Described<'_>> {
    operations_of(document, |item| item.get("servers").is_some())
}

fn operations_of(document: &Document, wanted: impl Fn(&Value) -> bool) -> Vec<Described<'_>> {
    let mut all = Vec::new();
    let paths = object(&document.root()["paths"]).iter();
    for (path, item) in paths.filter(|(_, item)| wanted(item)) {
        let operations = object(item).iter().filter(|(key, _)| *key != "servers");
        for (method, operation) in operations {
            all.push((path.as_str(), method.as_str(), operation));
        }
    }
    all
}

/// Its parameters, in one place of a request.
fn parameters<'d>(document: &'d Document, operation: &'d Value, place: &str) -> Vec<&'d Value> {
    let all = array(&operation["parameters"]).iter();
    let all = all.map(|parameter| document.resolved(parameter));
    all.filter(|parameter| parameter["in"] == place).collect()
}

fn called(parameters: &[&Value]) -> Names {
    names(
        parameters
            .iter()
            .map(|parameter| parameter["name"].as_str().unwrap()),
    )
}

#[test]
fn every_type_is_described_with_its_members_and_no_others() {
    let document = Document::read();
    for sample in samples() {
        let name = sample.name;
        let schema = document.schema(name);
        let (may, must) = document.members(schema);
        let has: Names = object(&sample.full).keys().cloned().collect();
        assert_eq!(may, has, "members of {name}");
        assert_eq!(must, sample.required, "members of {name} that are always there");
        (sample.reads)(&sample.full).unwrap();
        if sample.sendable {
            let faults = document.faults(schema, &sample.full);
            assert!(faults.is_empty(), "{name}: {faults:#?}");
        }
    }
}

#[test]
fn every_word_is_described() {
    let document = Document::read();
    for (name, list) in samples::words() {
        assert_eq!(words(&document.schema(name)["enum"]), list, "{name}");
    }
}

/// The types of the modules that hold what is sent, by their declarations.
fn declared() -> Names {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = vec![source.join("data.rs"), source.join("admin.rs")];
    for folder in ["data", "admin"] {
        for entry in std::fs::read_dir(source.join(folder)).unwrap() {
            files.push(entry.unwrap().path());
        }
    }
    let mut declared = Names::new();
    for file in files {
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let line = line.trim_start();
            let kinds = ["pub struct ", "pub enum ", "pub type "];
            if let Some(rest) = kinds.iter().find_map(|kind| line.strip_prefix(kind)) {
                let name = rest.chars().take_while(char::is_ascii_alphanumeric);
                declared.insert(name.collect());
            }
        }
    }
    declared
}

#[test]
fn no_type_is_forgotten() {
    let document = Document::read();
    let mut known: Names = samples().iter().map(|sample| sample.name.to_owned()).collect();
    known.extend(samples::words().iter().map(|(name, _)| (*name).to_owned()));
    known.insert("AclMapping".to_owned());
    for name in declared() {
        let elsewhere = GENERIC.contains(&name.as_str()) || QUERIES.contains(&name.as_str());
        assert!(
            elsewhere || known.contains(&name),
            "{name} has no sample in api/tests/openapi/samples"
        );
    }
    known.extend(names(NAMED));
    for operation in OPERATIONS {
        known.extend(["Item", "Result", "BatchResponse"].map(|part| format!("{operation}{part}")));
    }
    let described: Names = document.schemas().keys().cloned().collect();
    assert_eq!(described, known, "schemas of docs/openapi.json");
}

#[test]
fn a_mapping_has_two_forms() {
    let document = Document::read();
    let schema = document.schema("AclMapping");
    for mapping in mappings() {
        let mapping = value(&mapping);
        assert_eq!(document.faults(schema, &mapping), [""; 0]);
        reads::<AclMapping>(&mapping).unwrap();
    }
    for bad in [json!({}), json!({"contexts": ["a"]}), json!("a")] {
        assert!(!document.faults(schema, &bad).is_empty(), "{bad}");
        assert!(reads::<AclMapping>(&bad).is_err(), "{bad}");
    }
}

#[test]
fn an_item_is_a_request_that_may_leave_its_context_out() {
    let document = Document::read();
    for operation in OPERATIONS {
        let (may, mut must) = document.members(document.schema(&format!("{operation}Request")));
        let (item_may, item_must) = document.members(document.schema(&format!("{operation}Item")));
        assert!(must.remove("context"));
        assert_eq!((item_may, item_must), (may, must), "{operation}");
        let (may, must) = document.members(document.schema(&format!("{operation}Response")));
        let (mut result_may, mut result_must) =
            document.members(document.schema(&format!("{operation}Result")));
        assert!(result_may.remove("status") && result_must.remove("status"));
        assert_eq!((result_may, result_must), (may, must), "{operation}");
        for form in ["Batch", "BatchResponse"] {
            let list = &document.schema(&format!("{operation}{form}"))["properties"]["batch"];
            assert_eq!(list["maxItems"], BATCH_MAX_ITEMS, "{operation}{form}");
        }
    }
}

#[test]
fn a_batch_is_answered_for_each_item() {
    let document = Document::read();
    let sealed = json!({"status": 200, "ciphertext": "YWJj", "key_id": "kek-2fa-v1", "key_version": 1});
    let opened = json!({"status": 200, "plaintext": "YWJj"});
    let refused = json!({
        "status": 400, "code": "authentication_failed", "error": "decryption failed", "detail": "", "retryable": false,
    });
    let answers: [(&str, &Value, Reads); 4] = [
        ("Encrypt", &sealed, reads::<BatchResponse<EncryptResponse>>),
        ("Decrypt", &opened, reads::<BatchResponse<DecryptResponse>>),
        ("Rewrap", &sealed, reads::<BatchResponse<RewrapResponse>>),
        ("DataKey", &sealed, reads::<BatchResponse<DataKeyResponse>>),
    ];
    for (operation, good, reads) in answers {
        let schema = document.schema(&format!("{operation}BatchResponse"));
        let answer = json!({"batch": [good, refused]});
        assert_eq!(document.faults(schema, &answer), [""; 0], "{operation}");
        reads(&answer).unwrap();
        let answer = json!({"batch": [{"status": 200}]});
        assert!(!document.faults(schema, &answer).is_empty(), "{operation}");
    }
}

#[test]
fn every_example_is_what_it_is_an_example_of() {
    let document = Document::read();
    let samples = samples();
    let mut seen = 0;
    for (name, schema) in document.schemas() {
        let examples = schema.get("examples").map(array).unwrap_or_default();
        for example in examples {
            assert_eq!(document.faults(schema, example), [""; 0], "{name}");
            let sample = samples.iter().find(|sample| sample.name == name);
            // In a batch items leave out what stands beside them, which the types of a client do not.
            if !name.ends_with("Batch") {
                let sample = sample.unwrap_or_else(|| panic!("{name} has no sample"));
                (sample.reads)(example).unwrap();
            }
            seen += 1;
        }
    }
    assert!(seen > 10, "{seen} examples");
}

#[test]
fn every_code_is_listed_with_its_status() {
    let document = Document::read();
    let statuses: BTreeSet<u16> = ErrorCode::ALL.iter().map(|code| code.status()).collect();
    for name in ["Problem", "ItemError"] {
        let schema = &document.schema(name)["properties"]["status"]["enum"];
        assert_eq!(schema, &value(&statuses), "{name}");
    }
    let responses = object(&document.root()["components"]["responses"]);
    let mut described = BTreeSet::new();
    for (name, response) in responses {
        let content = &response["content"]["application/problem+json"];
        let rules = &content["schema"]["allOf"][1]["properties"];
        let status = rules["status"]["const"].as_u64().unwrap();
        let mine = || {
            let all = ErrorCode::ALL.iter();
            all.filter(move |code| u64::from(code.status()) == status)
        };
        let codes: Vec<&str> = mine().map(|code| code.as_str()).collect();
        assert_eq!(words(&rules["code"]["enum"]), codes, "{name}");
        let retry = response["headers"].get(canonical(headers::RETRY_AFTER));
        let retries = mine().any(|code| code.retry_after().is_some());
        assert_eq!(retry.is_some(), retries, "{name}");
        described.insert(u16::try_from(status).unwrap());
    }
    assert_eq!(described, statuses, "components.responses");
}

/// A header's name as the document writes it.
fn canonical(name: &str) -> String {
    let part = |part: &str| match part {
        "hsm" => "HSM".to_owned(),
        "ratelimit" => "RateLimit".to_owned(),
        _ => part[..1].to_uppercase() + &part[1..],
    };
    name.split('-').map(part).collect::<Vec<_>>().join("-")
}

/// Whether a path is answered from the replicated state, of which a caller may ask for a newer one.
fn is_of_a_state(path: &str) -> bool {
    let data = [paths::ENCRYPT, paths::DECRYPT, paths::REWRAP, paths::DATAKEY];
    data.contains(&path) || path.starts_with(paths::ADMIN_PREFIX)
}

#[test]
fn headers_are_called_what_they_are_called() {
    let document = Document::read();
    let common = [headers::X_HSM_INDEX, headers::X_HSM_NODE, headers::X_REQUEST_ID];
    let limits = [
        headers::RATELIMIT_LIMIT,
        headers::RATELIMIT_REMAINING,
        headers::RATELIMIT_RESET,
        headers::RATELIMIT_POLICY,
    ];
    for (path, method, operation) in operations(&document) {
        let asked = called(&parameters(&document, operation, "header"));
        let mut expected = names([headers::TRACEPARENT]);
        expected.insert(canonical(headers::X_REQUEST_ID));
        if path.starts_with(paths::ADMIN_PREFIX) {
            expected.insert(canonical(headers::X_HSM_REQUEST));
        }
        if is_of_a_state(path) {
            expected.insert(canonical(headers::X_HSM_MIN_INDEX));
        }
        // Whoever may repeat a change may also be told that it was another one.
        if operation["responses"].get("422").is_some() {
            expected.insert(canonical(headers::IDEMPOTENCY_KEY));
        }
        assert_eq!(asked, expected, "{method} {path}");
        for (status, response) in object(&operation["responses"]) {
            for name in common {
                let header = document.resolved(response)["headers"].get(canonical(name));
                let header = header.unwrap_or_else(|| panic!("{method} {path} {status}: {name}"));
                assert_eq!(document.resolved(header)["required"], true, "{name}");
            }
            // What watches an application is counted apart, and who is nobody not at all.
            let watches = [paths::HEALTH, paths::METRICS].contains(&path) && status == "200";
            let counted = !watches && status != "401";
            for name in limits {
                let header = document.resolved(response)["headers"].get(canonical(name));
                assert_eq!(header.is_some(), counted, "{method} {path} {status}: {name}");
            }
        }
    }
}

#[test]
fn every_operation_says_how_it_can_fail() {
    let document = Document::read();
    let mut ids = BTreeSet::new();
    let tags = array(&document.root()["tags"]).iter();
    let tags: Names = names(tags.map(|tag| tag["name"].as_str().unwrap()));
    for (path, method, operation) in probes(&document).into_iter().chain(operations(&document)) {
        let at = format!("{method} {path}");
        assert!(
            ids.insert(operation["operationId"].as_str().unwrap()),
            "{at}: its operationId is another's"
        );
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{at}");
        assert!(
            words(&operation["tags"]).iter().all(|tag| tags.contains(tag)),
            "{at}"
        );
    }
    for (path, method, operation) in operations(&document) {
        let at = format!("{method} {path}");
        let in_path = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
        let described = parameters(&document, operation, "path");
        assert_eq!(called(&described), names(in_path), "{at}");
        assert!(
            described.iter().all(|parameter| parameter["required"] == true),
            "{at}"
        );

        let admin = path.starts_with(paths::ADMIN_PREFIX);
        let posts = method == "post";
        assert_eq!(operation.get("requestBody").is_some(), posts, "{at}");
        // What stands before every route can answer, and what reads a body.
        let mut least = vec!["200", "400", "401", "403", "429", "500", "503"];
        if posts {
            least.push("413");
        }
        if posts && admin {
            least.push("415");
        }
        if is_of_a_state(path) {
            least.extend(["400", "412"]);
        }
        let responses = object(&operation["responses"]);
        for status in least {
            assert!(responses.contains_key(status), "{at}: {status} is missing");
        }
        for (status, response) in responses.iter().filter(|(status, _)| *status != "200") {
            let content = &document.resolved(response)["content"]["application/problem+json"];
            let own = &content["schema"]["allOf"][1]["properties"]["status"]["const"];
            assert_eq!(&own.to_string(), status, "{at}");
        }
    }
}

/// Plain HTTP and text, without a certificate and without the headers of the API's answers.
#[test]
fn probes_are_described_as_what_they_are() {
    let document = Document::read();
    let described = probes(&document);
    let which: Vec<_> = described
        .iter()
        .map(|(path, method, _)| (*path, *method))
        .collect();
    assert_eq!(which, [(paths::LIVEZ, "get"), (paths::READYZ, "get")]);
    for (path, _, operation) in described {
        assert!(array(&operation["security"]).is_empty(), "{path}");
        let queries = match path {
            paths::READYZ => names(["verbose", "stale", "slot"]),
            _ => Names::new(),
        };
        assert_eq!(
            called(&parameters(&document, operation, "query")),
            queries,
            "{path}"
        );
        let responses = object(&operation["responses"]);
        let statuses: Vec<&str> = responses.keys().map(String::as_str).collect();
        let expected: &[&str] = match path {
            paths::READYZ => &["200", "403", "503"],
            _ => &["200", "403"],
        };
        assert_eq!(statuses, expected, "{path}");
        for (status, response) in responses {
            let headers: Vec<&String> = object(&response["headers"]).keys().collect();
            assert_eq!(headers, ["Cache-Control"], "{path} {status}");
            let media: Vec<&String> = object(&response["content"]).keys().collect();
            let expected = match status.as_str() {
                "403" => "application/problem+json",
                _ => "text/plain",
            };
            assert_eq!(media, [expected], "{path} {status}");
        }
        let foreign =
            &responses["403"]["content"]["application/problem+json"]["schema"]["allOf"][1]["properties"];
        assert_eq!(
            foreign["code"]["const"],
            ErrorCode::ForeignOrigin.as_str(),
            "{path}"
        );
        assert_eq!(
            foreign["status"]["const"],
            ErrorCode::ForeignOrigin.status(),
            "{path}"
        );
    }
}

#[test]
fn a_query_has_the_members_of_its_type() {
    let document = Document::read();
    let members = |query: &Value| object(query).keys().cloned().collect::<Names>();
    for (path, query) in [
        (paths::ACL_TEST, value(&AclQuestion::default())),
        (paths::REVOCATIONS, value(&RevocationsPage::default())),
    ] {
        let operation = &document.root()["paths"][path]["get"];
        let described = parameters(&document, operation, "query");
        assert_eq!(called(&described), members(&query), "{path}");
    }
    let with_queries = operations(&document).into_iter();
    let with_queries = with_queries.filter(|(_, _, one)| !parameters(&document, one, "query").is_empty());
    assert_eq!(with_queries.count(), QUERIES.len());
}

#[test]
fn every_reference_leads_somewhere_and_every_schema_is_used() {
    let document = Document::read();
    let mut used = BTreeSet::new();
    let mut rest = vec![document.root()];
    while let Some(value) = rest.pop() {
        if let Some(reference) = value.get("$ref").and_then(Value::as_str) {
            assert!(document.find(reference).is_some(), "{reference} leads nowhere");
            used.insert(reference);
        }
        match value {
            Value::Object(members) => rest.extend(members.values()),
            Value::Array(items) => rest.extend(items),
            _ => {}
        }
    }
    for name in document.schemas().keys() {
        let reference = format!("#/components/schemas/{name}");
        assert!(used.contains(reference.as_str()), "{name} is used by nothing");
    }
}
