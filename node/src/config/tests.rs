use std::path::Path;
use std::time::Duration;

use hsm_core::envelope::Binding;

use super::*;

mod unknown_keys;

const V1: &str = r#"
server:
  port: "8443"
  tls: {ca_path: pki/ca.crt, cert_path: pki/server.crt, key_path: pki/server.key}
  http2: {max_concurrent_streams: "2000", initial_window_size: "4M", max_frame_size: "1M",
          max_header_list_size: "2M", idle_timeout_seconds: 120,
          max_upload_buffer_per_conn: "4M", max_upload_buffer_per_stream: "4M"}
hsm:
  pkcs11_lib: /usr/lib/softhsm/libsofthsm2.so
  slot_id: hsm-token
  pin: ""
  metadata_file: metadata.yaml
  max_versions: 3
  cleanup_after_days: 30
  keys:
    exchange-key: {type: aes, mode: shared}
    2fa: {type: aes, mode: private}
acl:
  revoked_file: pki/revoked.yaml
  mappings: {Trading: [exchange-key], 2FA: [2fa], Database: []}
rate_limit: {requests_per_second: 50000, burst: 5000}
logging: {level: info, format: json, error_path: a, max_size_mb: 100, compress: true, audit_mirror_to_error_on_debug: true}
"#;

const CLUSTER: &str = r#"
server:
  listen: 127.0.0.1:8443
  tls: {ca_path: ca, cert_path: crt, key_path: key}
hsm:
  slots:
    exchange: {label: slot-exchange, pin_env: PIN_A, contexts: [exchange-key, order-key]}
    2fa: {label: slot-2fa, pin_file: /run/pin, contexts: [2fa], threads: 2}
  keys: {order-key: {mode: shared}}
acl: {mappings: {Trading: [exchange-key]}}
cluster:
  mode: active-active
  node_id: hsm-node-1
  tls: {ca_path: cca, cert_path: ccrt, key_path: ckey}
  coordination: {type: raft}
"#;

fn full(name: &str) -> Option<String> {
    match name {
        "HSM_PIN" | "PIN_A" => Some("1234".to_owned()),
        "TOKEN_REPLICATION_KEY" => Some("k".to_owned()),
        name if name.starts_with("HSM_PIN_") => Some("1234".to_owned()),
        _ => None,
    }
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("config.yaml"), Some(0o600), &full)
}

fn refusal(text: &str) -> String {
    match parse(text) {
        Ok(_) => panic!("was accepted:\n{text}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn v1s_file_loads_unchanged() {
    let config = parse(V1).unwrap();
    assert_eq!(config.server.listen, "0.0.0.0:8443".parse().unwrap());
    assert_eq!(config.cluster.mode, Mode::Standalone);
    assert_eq!(config.cluster.api_advertise, "127.0.0.1:8443");
    assert!(config.cluster.peer.is_none() && config.hsm.legacy);
    let slot = &config.hsm.slots[0];
    assert_eq!((slot.label.as_str(), slot.insecure_pin), ("hsm-token", true));
    assert_eq!(slot.contexts.len(), 2);
    assert_eq!(config.hsm.binding("exchange-key"), Binding::Shared);
    assert_eq!(config.hsm.binding("2fa"), Binding::Private);
    assert!(config.acl.mappings["Database"].is_empty());
    assert_eq!(config.ignored.len(), 5, "{:?}", config.ignored);
    assert!(
        config
            .ignored
            .iter()
            .all(|line| line.starts_with("server.http2."))
    );
    assert_eq!(config.logging.error.path.as_deref(), Some(Path::new("a")));
    assert!(config.logging.error.to_stdout && config.logging.rotation.compress);
    let metadata = config.hsm.metadata_file.as_deref();
    assert_eq!(metadata, Some(Path::new("metadata.yaml")));
    let beside_slots = CLUSTER.replace("hsm:\n", "hsm:\n  metadata_file: metadata.yaml\n");
    let config = parse(&beside_slots).unwrap();
    assert_eq!(config.hsm.metadata_file, None);
    assert!(
        config.warnings[0].contains("hsmctl key adopt"),
        "{:?}",
        config.warnings
    );
}

#[test]
fn a_cluster_node_gets_its_defaults() {
    let config = parse(CLUSTER).unwrap();
    let peer = config.cluster.peer.as_ref().unwrap();
    assert_eq!(peer.advertise, "127.0.0.1:8445");
    assert_eq!(config.cluster.raft.heartbeat, Duration::from_millis(200));
    assert_eq!(config.cluster.raft.election_max, Duration::from_millis(1200));
    assert_eq!(config.cluster.fence_after, Duration::from_secs(8));
    assert_eq!(config.staleness.decrypt, Duration::from_secs(300));
    assert_eq!(config.server.limits.max_body_bytes, 1_048_576);
    assert_eq!(config.server.limits.min_index_wait, Duration::from_secs(1));
    assert_eq!(config.hsm.slot_of("order-key").unwrap().name.as_str(), "exchange");
    assert_eq!(config.hsm.slots.iter().map(|slot| slot.threads).sum::<usize>(), 3);
    assert!(config.ignored.is_empty() && config.warnings.is_empty());
}

#[test]
fn an_unknown_key_is_named_with_its_path_and_the_one_meant() {
    let error = refusal(&CLUSTER.replace("pin_env: PIN_A", "pinenv: PIN_A"));
    assert!(
        error.contains("hsm.slots.exchange.pinenv: unknown key"),
        "{error}"
    );
    assert!(error.contains("did you mean pin_env?"), "{error}");
    let error = refusal(&CLUSTER.replace("cluster:", "clutser:"));
    assert!(error.starts_with("config: clutser: unknown key"), "{error}");
    assert!(error.contains("did you mean cluster?"), "{error}");
    let error = refusal(&format!("{CLUSTER}logging: {{database: x}}\n"));
    assert!(
        error.contains("logging.database") && error.contains("known here: level"),
        "{error}"
    );
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_path() {
    let error = refusal(&CLUSTER.replace("threads: 2", "threads: two"));
    assert!(error.starts_with("config: hsm.slots.2fa.threads: "), "{error}");
}

#[test]
fn broken_yaml_names_the_file() {
    let error = refusal("}{");
    assert!(error.starts_with("config: config.yaml: "), "{error}");
}

#[test]
fn an_empty_section_means_its_defaults() {
    let config = parse(&format!(
        "{CLUSTER}rate_limit:\nstaleness:\nlogging: ~\nmetrics:\n"
    ))
    .unwrap();
    assert_eq!(config.rate_limit.burst.get(), 5000);
    assert!(!config.client_metrics);
}

/// Wrappers pass variables on whether they are set or not.
#[test]
fn an_empty_variable_takes_nothing_out_of_the_file() {
    let empty = |name: &str| match name {
        "HSM_PIN" => Some("1234".to_owned()),
        name if name.starts_with("HSM_") => Some(String::new()),
        _ => None,
    };
    let text = V1.replace("level: info, format: json", "level: debug, format: text");
    let config = Config::parse(&text, Path::new("c"), None, &empty).unwrap();
    assert_eq!(config.hsm.slots[0].label, "hsm-token");
    assert_eq!(
        config.hsm.slots[0].pkcs11_lib,
        Path::new("/usr/lib/softhsm/libsofthsm2.so")
    );
    assert_eq!(config.server.listen.port(), 8443);
    assert_eq!(config.server.tls.ca_path, Path::new("pki/ca.crt"));
    assert_eq!(
        (config.logging.level.as_str(), config.logging.format),
        ("debug", LogFormat::Text)
    );
}

#[test]
fn an_address_of_a_peer_is_checked_where_it_stands() {
    let with = |entry: &str| {
        CLUSTER.replace(
            "coordination:",
            &format!("peer_addresses: {{{entry}}}\n  coordination:"),
        )
    };
    let config = parse(&with("hsm-node-2: \"10.0.0.2:8445\"")).unwrap();
    assert_eq!(
        config.cluster.peer.unwrap().addresses["hsm-node-2"],
        "10.0.0.2:8445"
    );
    for (entry, start, rest) in [
        (
            "hsm-node-2: \"10.0.0.2\"",
            "config: cluster.peer_addresses.hsm-node-2: 10.0.0.2: is not host:port",
            "write one such as",
        ),
        (
            "hsm-node-2: \"0.0.0.0:8445\"",
            "config: cluster.peer_addresses.hsm-node-2: 0.0.0.0:8445: means all addresses",
            "under which others reach the node",
        ),
        (
            "\"no name\": \"10.0.0.2:8445\"",
            "config: cluster.peer_addresses.no name: ",
            "no name",
        ),
    ] {
        let error = refusal(&with(entry));
        assert!(error.starts_with(start) && error.contains(rest), "{error}");
    }
}

#[test]
fn an_unset_pin_variable_is_named_with_its_key() {
    let error = refusal(&CLUSTER.replace("PIN_A", "PIN_B"));
    assert!(
        error.starts_with(
            "config: hsm.slots.exchange.pin_env: environment variable PIN_B is not set; export it"
        ),
        "{error}"
    );
}

#[test]
fn a_queue_without_room_for_the_largest_batch_is_refused_with_the_reason() {
    let with = |queue: &str| CLUSTER.replace("threads: 2", &format!("threads: 2, queue: {queue}"));
    let error = refusal(&with("999"));
    assert!(error.starts_with("config: hsm.slots.2fa.queue: 999: "), "{error}");
    assert!(
        error.contains("largest batch") && error.contains("1000 or more"),
        "{error}"
    );
    let config = parse(&with("1000")).unwrap();
    assert!(config.hsm.slots.iter().any(|slot| slot.queue == 1000));
}

#[test]
fn a_context_in_two_slots_is_refused() {
    let error = refusal(&CLUSTER.replace("contexts: [2fa]", "contexts: [2fa, order-key]"));
    assert!(
        error.contains("context order-key") && error.contains("hsm.slots.2fa"),
        "{error}"
    );
    assert!(error.contains("hsm.slots.exchange"), "{error}");
}

#[test]
fn legacy_and_multi_slot_mode_together_are_refused() {
    let error = refusal(&CLUSTER.replace("hsm:\n", "hsm:\n  slot_id: hsm-token\n"));
    assert!(
        error.starts_with("config: hsm.slot_id: hsm-token: set together"),
        "{error}"
    );
}

#[test]
fn external_coordinators_are_refused_with_the_reason() {
    for kind in ["etcd", "consul"] {
        let error = refusal(&CLUSTER.replace("type: raft", &format!("type: {kind}, endpoints: [a]")));
        assert!(
            error.contains("cluster.coordination.type") && error.contains("built in"),
            "{error}"
        );
    }
}

#[test]
fn elections_shorter_than_three_heartbeats_are_refused() {
    let raft = "coordination: {type: raft}\n  raft: {heartbeat_ms: 300}";
    let error = refusal(&CLUSTER.replace("coordination: {type: raft}", raft));
    assert!(
        error.starts_with("config: cluster.raft.election_min_ms: 800: "),
        "{error}"
    );
    assert!(error.contains("at least 900"), "{error}");
}

#[test]
fn a_cluster_without_a_replication_key_is_refused() {
    let only_pin = |name: &str| (name == "PIN_A").then(|| "1234".to_owned());
    let error = Config::parse(CLUSTER, Path::new("c"), None, &only_pin)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("encryption_key_env: environment variable TOKEN_REPLICATION_KEY"),
        "{error}"
    );
}

#[test]
fn the_replication_key_beside_the_first_one_is_read_only_where_there_is_one() {
    let with = |lines: &str, set: &'static [&'static str]| {
        let env = move |name: &str| {
            let value = if name == "PIN_A" { "1234" } else { "ab" };
            let known = ["PIN_A", "TOKEN_REPLICATION_KEY"].contains(&name) || set.contains(&name);
            known.then(|| value.to_owned())
        };
        let text = CLUSTER.replace(
            "  coordination:",
            &format!("  token_replication: {{{lines}}}\n  coordination:"),
        );
        let config = Config::parse(&text, Path::new("c"), None, &env);
        config.map(|config| config.cluster.replication.previous)
    };
    let from = |variable: &str| {
        Some(ReplicationKeySource::Env {
            key: "cluster.token_replication.previous_encryption_key_env".to_owned(),
            variable: variable.to_owned(),
        })
    };
    assert_eq!(with("", &[]).unwrap(), None);
    assert_eq!(
        with("", &["TOKEN_REPLICATION_KEY_PREVIOUS"]).unwrap(),
        from("TOKEN_REPLICATION_KEY_PREVIOUS")
    );
    assert_eq!(
        with("previous_encryption_key_env: OLD", &["OLD"]).unwrap(),
        from("OLD")
    );
    let unset = with("previous_encryption_key_env: OLD", &[])
        .unwrap_err()
        .to_string();
    assert!(
        unset.contains("previous_encryption_key_env: environment variable OLD"),
        "{unset}"
    );
    let both = "previous_encryption_key_env: OLD, previous_encryption_key_file: old.key";
    let both = with(both, &["OLD"]).unwrap_err().to_string();
    assert!(both.contains("keep one of them"), "{both}");
}

#[test]
fn the_period_of_full_comparisons_is_configured_within_its_bounds() {
    let with = |line: &str| {
        let section = format!("  token_replication: {{{line}}}\n  coordination:");
        CLUSTER.replace("  coordination:", &section)
    };
    let period = |line: &str| parse(&with(line)).unwrap().cluster.replication.interval;
    assert_eq!(period(""), Duration::from_secs(60));
    assert_eq!(period("interval_seconds: 1"), Duration::from_secs(1));
    assert_eq!(period("interval_seconds: 86400"), Duration::from_secs(86_400));
    for outside in [0, 86_401] {
        let error = refusal(&with(&format!("interval_seconds: {outside}")));
        let named = format!("cluster.token_replication.interval_seconds: {outside}");
        assert!(
            error.contains(&named) && error.contains("is outside 1 to 86400"),
            "{error}"
        );
    }
}

#[test]
fn a_standalone_node_without_a_replication_key_makes_one() {
    let only_pin = |name: &str| (name == "HSM_PIN").then(|| "1234".to_owned());
    let config = Config::parse(V1, Path::new("c"), None, &only_pin).unwrap();
    assert_eq!(config.cluster.replication.key, ReplicationKeySource::DataDir);
}

#[test]
fn a_pin_in_a_file_others_can_read_is_refused_and_never_repeated() {
    let text = V1.replace("pin: \"\"", "pin: 0123456789");
    let none = |_: &str| -> Option<String> { None };
    let error = Config::parse(&text, Path::new("c.yaml"), Some(0o644), &none).unwrap_err();
    assert!(error.to_string().contains("chmod 600 c.yaml"), "{error}");
    let config = Config::parse(&text, Path::new("c.yaml"), Some(0o600), &none).unwrap();
    assert!(config.warnings.iter().any(|line| line.starts_with("hsm.pin: ")));
    assert!(!format!("{config:?}").contains("0123456789"));
    match &config.hsm.slots[0].pin {
        // The digits as written: a number would have lost its leading zero.
        PinSource::Inline(pin) => assert_eq!(pin.expose(), "0123456789"),
        other => panic!("unexpected source {other:?}"),
    }
}

#[test]
fn a_pin_may_be_asked_for_instead_of_read() {
    let config = parse(&CLUSTER.replace("pin_env: PIN_A", "pin_prompt: true")).unwrap();
    match &config.hsm.slot_of("exchange-key").unwrap().pin {
        PinSource::Prompt { key, typed } => {
            assert_eq!(key, "hsm.slots.exchange.pin_prompt");
            assert!(typed.get().is_none(), "nobody was asked yet");
        }
        other => panic!("unexpected source {other:?}"),
    }
    // Copies of the configuration have the PIN too, once it was typed.
    let copy = config.hsm.clone();
    let pin_of = |hsm: &Hsm| match &hsm.slot_of("exchange-key").unwrap().pin {
        PinSource::Prompt { typed, .. } => std::sync::Arc::clone(typed),
        other => panic!("unexpected source {other:?}"),
    };
    let typed = hsm_core::secrets::Pin::new("planted-secret".to_owned());
    assert!(pin_of(&config.hsm).set(typed).is_ok());
    assert_eq!(pin_of(&copy).get().unwrap().expose(), "planted-secret");
    assert!(!format!("{config:?}").contains("planted-secret"));
    // Not asking is saying nothing.
    assert!(parse(&CLUSTER.replace("pin_env: PIN_A", "pin_env: PIN_A, pin_prompt: false")).is_ok());
}

#[test]
fn a_pin_has_one_source() {
    for two in [
        "pin_env: PIN_A, pin_prompt: true",
        "pin_file: /run/pin, pin_prompt: true",
        "pin_credential: pin, pin_prompt: true",
        "pin_env: PIN_A, pin_file: /run/pin",
    ] {
        let error = refusal(&CLUSTER.replace("pin_env: PIN_A", two));
        assert!(
            error.starts_with("config: hsm.slots.exchange.pin_file: ") && error.contains("pin_prompt"),
            "{two}: {error}"
        );
    }
    let error = refusal(&CLUSTER.replace("pin_env: PIN_A", "pin_prompt: false"));
    assert!(
        error.starts_with("config: hsm.slots.exchange.pin_file: is not set; ")
            && error.contains("pin_prompt"),
        "{error}"
    );
}

#[test]
fn v1s_pin_is_asked_for_only_where_there_is_none() {
    let none = |_: &str| -> Option<String> { None };
    let asked = V1.replace("pin: \"\"", "pin: \"\"\n  pin_prompt: true");
    let config = Config::parse(&asked, Path::new("c"), Some(0o644), &none).unwrap();
    assert!(
        matches!(&config.hsm.slots[0].pin, PinSource::Prompt { key, .. } if key == "hsm.pin_prompt"),
        "{:?}",
        config.hsm.slots[0].pin
    );
    let error = refusal(&asked);
    assert!(
        error.starts_with("config: hsm.pin_prompt: true: HSM_PIN has the PIN already; "),
        "{error}"
    );
    let both = V1.replace("pin: \"\"", "pin: planted-secret\n  pin_prompt: true");
    let error = Config::parse(&both, Path::new("c"), Some(0o600), &none)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("config: hsm.pin_prompt: true: hsm.pin has the PIN already; "),
        "{error}"
    );
    assert!(!error.contains("planted-secret"), "{error}");
    let error = refusal(&CLUSTER.replace("hsm:\n", "hsm:\n  pin_prompt: true\n"));
    assert!(
        error.starts_with("config: hsm.pin_prompt: true: has no meaning beside hsm.slots; "),
        "{error}"
    );
}

#[test]
fn an_error_never_quotes_the_lines_around_it() {
    let text = V1.replace("pin: \"\"", "pin: planted-secret\n  nonsense: 1");
    let error = refusal(&text);
    assert!(
        error.contains("hsm.nonsense") && !error.contains("planted-secret"),
        "{error}"
    );
    let error = refusal(&V1.replace("pin: \"\"", "pin: \"planted-secret"));
    assert!(!error.contains("planted-secret"), "{error}");
}

#[test]
fn a_context_of_no_slot_is_refused_where_it_has_a_mode_and_warned_about_in_the_acl() {
    let error = refusal(&CLUSTER.replace("keys: {order-key", "keys: {oder-key"));
    assert!(
        error.contains("hsm.keys.oder-key") && error.contains("did you mean order-key?"),
        "{error}"
    );
    let config = parse(&CLUSTER.replace("Trading: [exchange-key]", "Trading: [elsewhere]")).unwrap();
    assert!(config.warnings[0].contains("elsewhere"), "{:?}", config.warnings);
}

#[test]
fn a_contexts_limit_of_invocations_is_its_own_and_never_above_that_of_the_algorithm() {
    let with = |limit: &str| {
        let section = format!("keys: {{order-key: {{mode: shared, max_invocations: {limit}}}}}");
        CLUSTER.replace("keys: {order-key: {mode: shared}}", &section)
    };
    let config = parse(&with("2000")).unwrap();
    let order = ContextName::new("order-key").unwrap();
    let limits: Vec<_> = config.hsm.max_invocations.into_iter().collect();
    assert_eq!(limits, [(order, 2000)]);
    assert!(parse(CLUSTER).unwrap().hsm.max_invocations.is_empty());
    parse(&with("4294967296")).unwrap();
    for limit in ["4294967297", "999", "0"] {
        let error = refusal(&with(limit));
        assert!(
            error.contains("hsm.keys.order-key.max_invocations") && error.contains("4294967296"),
            "{error}"
        );
    }
}

#[test]
fn a_fence_inside_readiness_is_refused() {
    let error = refusal(&format!("{CLUSTER}staleness: {{ready_ms: 9000}}\n"));
    assert!(
        error.starts_with("config: cluster.fence_after_ms: 8000: "),
        "{error}"
    );
}

#[test]
fn a_fence_leaves_room_for_a_frame_that_waited() {
    let with = |fence: u32, raft: &str| {
        let raft = format!("coordination: {{type: raft}}\n  fence_after_ms: {fence}\n  raft: {{{raft}}}");
        CLUSTER.replace("coordination: {type: raft}", &raft)
    };
    // 5000 + 2 × 1200 + 1.5 × 200.
    assert!(parse(&with(7700, "heartbeat_ms: 200")).is_ok());
    let error = refusal(&with(7699, "heartbeat_ms: 200"));
    assert!(
        error.starts_with("config: cluster.fence_after_ms: 7699: ") && error.contains("at least 7700"),
        "{error}"
    );
    // Slower elections need a longer fence.
    let slow = "heartbeat_ms: 500, election_min_ms: 1500, election_max_ms: 3500";
    let error = refusal(&with(8000, slow));
    assert!(error.contains("at least 12750"), "{error}");
    assert!(parse(&with(12_750, slow)).is_ok());
}

#[test]
fn nobody_is_removed_unless_it_is_configured_and_none_that_is_waited_for() {
    let with = |rules: &str| {
        let section = format!("coordination: {{type: raft}}\n  autopilot: {{{rules}}}");
        CLUSTER.replace("coordination: {type: raft}", &section)
    };
    let rules = |text: &str| parse(text).unwrap().cluster.autopilot;
    assert_eq!(rules(CLUSTER).remove_dead_after, None);
    assert_eq!(rules(&with("min_voters: 5")).remove_dead_after, None);
    let after = rules(&with("remove_dead_after_seconds: 600"));
    assert_eq!(
        (after.remove_dead_after, after.min_voters),
        (Some(Duration::from_secs(600)), 3)
    );
    for (refused, key) in [
        ("remove_dead_after_seconds: 9", "remove_dead_after_seconds: 9"),
        ("min_voters: 2", "min_voters: 2"),
    ] {
        let error = refusal(&with(refused));
        let key = format!("config: cluster.autopilot.{key}");
        assert!(error.starts_with(&key), "{error}");
    }
    let slow = CLUSTER.replace(
        "coordination: {type: raft}",
        "coordination: {type: raft}\n  fence_after_ms: 60000\n  autopilot: {remove_dead_after_seconds: 59}",
    );
    let error = refusal(&slow);
    assert!(
        error.contains("cluster.fence_after_ms (60000)") && error.contains("at least 60"),
        "{error}"
    );
}

/// Work on a stopped node's directory needs none of its secrets, and writes none of its files.
#[test]
fn where_a_node_keeps_its_state_is_read_without_its_secrets() {
    let text = format!("{CLUSTER}data_dir: /var/lib/hsm\nlogging: {{audit_path: /var/log/audit.log}}\n");
    let place = |text: &str| Place::parse(text, Path::new("config.yaml"), &|_: &str| None);
    let found = place(&text).unwrap();
    assert_eq!(found.data_dir, Path::new("/var/lib/hsm"));
    assert_eq!(found.node_id, parse(CLUSTER).unwrap().cluster.node_id);
    assert_eq!(found.logging.audit.path, None);
    let alone = place("dev: false").unwrap();
    assert_eq!(
        (alone.node_id.as_str(), alone.data_dir.as_path()),
        ("hsm-node-1", Path::new("data"))
    );
    assert!(
        place("data_dri: x").is_err(),
        "a misspelt key is no silence here either"
    );
    assert!(place("cluster: {mode: active-active}").is_err(), "whose is it?");
}

#[test]
fn a_level_that_is_none_is_refused() {
    let error = refusal(&format!("{CLUSTER}logging: {{level: inof}}\n"));
    assert!(error.starts_with("config: logging.level: inof: "), "{error}");
    let error = refusal(&format!("{CLUSTER}logging: {{level: \"info,hsm=loud\"}}\n"));
    assert!(error.starts_with("config: logging.level: "), "{error}");
}

#[test]
fn every_example_file_is_accepted() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config-examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let text = std::fs::read_to_string(&path).unwrap();
            if let Err(error) = Config::parse(&text, &path, Some(0o600), &full) {
                panic!("{}: {error}", path.display());
            }
            seen += 1;
        }
    }
    assert!(seen >= 3, "only {seen} example files");
}
