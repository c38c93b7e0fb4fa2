use super::*;

fn rendered(record: impl FnOnce()) -> String {
    let recorder = builder().unwrap().build_recorder();
    let handle = recorder.handle();
    metrics::with_local_recorder(&recorder, || {
        describe();
        begin();
        record();
    });
    handle.run_upkeep();
    handle.render()
}

#[test]
fn what_has_no_label_is_there_before_anything_happens() {
    let text = rendered(|| {});
    for name in [
        "hsm_acl_failures_total 0",
        "hsm_active_connections 0",
        "hsm_raft_term 0",
        "hsm_raft_quorum_ack_age_seconds -1",
        "hsm_raft_append_fsync_seconds_count 0",
        "hsm_request_duration_seconds_count{endpoint=\"/encrypt\"} 0",
        "hsm_raft_role{role=\"uninitialised\"} 1",
        "hsm_config_differs{section=\"revocations\"} 0",
        "hsm_rotation_clock_alarm 0",
        "hsm_raft_failure_tolerance -1",
        "hsm_standby 0",
        "hsm_keys_known_to_removed{kind=\"replication\"} 0",
        "hsm_batch_items_total{operation=\"rewrap\",code=\"ok\"} 0",
        "hsm_client_cert_refusals_total{reason=\"not_trusted\"} 0",
        "hsm_proxy_protocol_refusals_total{reason=\"version_1\"} 0",
        "# TYPE hsm_raft_append_fsync_seconds histogram",
    ] {
        assert!(text.contains(name), "{name} is not in\n{text}");
    }
}

#[test]
fn each_section_of_the_configuration_differs_by_itself() {
    let text = rendered(|| config_differs([("acl", false), ("roles", true), ("revocations", true)]));
    for line in [
        "hsm_config_differs{section=\"acl\"} 0",
        "hsm_config_differs{section=\"roles\"} 1",
        "hsm_config_differs{section=\"revocations\"} 1",
        "hsm_config_differs{section=\"slots\"} 0",
        "hsm_config_differs{section=\"bindings\"} 0",
        "hsm_config_differs{section=\"rotation\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn v1s_names_and_labels_stand() {
    let text = rendered(|| {
        request("/encrypt", Some("trading-1"), 200, Duration::from_micros(300));
        rate_limit_hit("trading-1");
        encryption("exchange-key".into(), true);
        decryption("exchange-key".into(), false);
        rewrapping("exchange-key".into(), true);
        data_key("exchange-key".into(), true);
        error("encrypt");
    });
    for line in [
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"200\"} 1",
        "hsm_rate_limit_hits_total 1",
        "hsm_encrypt_operations_total{context=\"exchange-key\",status=\"success\"} 1",
        "hsm_decrypt_operations_total{context=\"exchange-key\",status=\"error\"} 1",
        "hsm_rewrap_operations_total{context=\"exchange-key\",status=\"success\"} 1",
        "hsm_datakey_operations_total{context=\"exchange-key\",status=\"success\"} 1",
        "hsm_errors_total{operation=\"encrypt\"} 1",
        "hsm_request_duration_seconds_bucket{endpoint=\"/encrypt\",le=\"0.0002\"} 0",
        "hsm_request_duration_seconds_bucket{endpoint=\"/encrypt\",le=\"0.0005\"} 1",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
}

#[test]
fn with_names_of_clients_what_is_shown_without_them_is_the_sum() {
    let text = rendered(|| {
        for (client, status) in [
            ("trading-1", 200),
            ("trading-1", 200),
            ("2fa \"1\"", 200),
            ("other", 403),
        ] {
            request_of("/encrypt", Some(client.to_owned().into()), status);
        }
        // Nobody knows whose it was.
        request_of("/encrypt", None, 401);
        for (client, hits) in [("trading-1", 2), ("2fa \"1\"", 3)] {
            for _ in 0..hits {
                rate_limit_hit_of(Some(client.to_owned().into()));
            }
        }
    });
    for line in [
        "hsm_requests_total{endpoint=\"/encrypt\",client_cn=\"trading-1\",status=\"200\"} 2",
        "hsm_requests_total{endpoint=\"/encrypt\",client_cn=\"2fa \\\"1\\\"\",status=\"200\"} 1",
        "hsm_requests_total{endpoint=\"/encrypt\",client_cn=\"other\",status=\"403\"} 1",
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"401\"} 1",
        "hsm_rate_limit_hits_total{client_cn=\"trading-1\"} 2",
        "hsm_rate_limit_hits_total{client_cn=\"2fa \\\"1\\\"\"} 3",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let open = without_names(&text);
    assert!(!open.contains("client_cn"), "{open}");
    for line in [
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"200\"} 3",
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"403\"} 1",
        "hsm_requests_total{endpoint=\"/encrypt\",status=\"401\"} 1",
        "hsm_rate_limit_hits_total 5",
    ] {
        let found = open.lines().filter(|found| *found == line).count();
        assert_eq!(found, 1, "{line} in\n{open}");
    }
}

#[test]
fn without_a_certificate_only_contexts_are_missing() {
    let text = rendered(|| {
        request("/encrypt", None, 200, Duration::from_micros(300));
        encryption("exchange-key".into(), true);
        encryption("2fa".into(), true);
        token_call("a".into(), "encrypt", true, Duration::from_micros(20));
    });
    let open = without_names(&text);
    let differ = |a: &str, b: &str| -> Vec<String> {
        let gone = a.lines().filter(|line| !b.lines().any(|other| other == *line));
        gone.map(str::to_owned).collect()
    };
    let sum = "hsm_encrypt_operations_total{status=\"success\"} 2";
    assert_eq!(differ(&open, &text), [sum]);
    let hidden = differ(&text, &open);
    assert_eq!(hidden.len(), 2, "{hidden:?}");
    assert!(
        hidden.iter().all(|line| line.contains("{context=\"")),
        "{hidden:?}"
    );
}

#[test]
fn how_much_of_a_key_is_given_out_is_shown_by_context() {
    let text = rendered(|| {
        invocations_leased(&"2fa".into(), 500, 2000, false);
        invocations_leased(&"exchange-key".into(), 1800, 2000, true);
        invocations_leased(&"order-key".into(), 0, 0, true);
        invocations_left(&"2fa".into(), 70);
        invocations_left(&"order-key".into(), 0);
    });
    for line in [
        "hsm_key_invocations_leased_ratio{context=\"2fa\"} 0.25",
        "hsm_key_invocations_leased_ratio{context=\"exchange-key\"} 0.9",
        "hsm_key_invocations_leased_ratio{context=\"order-key\"} 0",
        "hsm_key_invocations_due{context=\"2fa\"} 0",
        "hsm_key_invocations_due{context=\"exchange-key\"} 1",
        "hsm_key_invocations_left{context=\"2fa\"} 70",
        "hsm_key_invocations_left{context=\"order-key\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let open = without_names(&text);
    for line in [
        "hsm_key_invocations_leased_ratio 0.9\n",
        "hsm_key_invocations_due 2\n",
        "hsm_key_invocations_left 0\n",
    ] {
        assert!(open.contains(line), "{open}");
    }
}

#[test]
fn what_alerts_compare_is_shown_as_it_is() {
    let text = rendered(|| {
        voters(3, Some(0));
        disk(1 << 30, true);
        ready(false, true);
        clock(Duration::from_millis(1_700_000_000_250));
        certificate_ends("api", 1_800_000_000);
        known_to_removed([("version", 2), ("transport", 1), ("replication", 1)]);
        rotation_due(&"2fa".into(), true);
        rotation_due(&"exchange-key".into(), true);
        rotation_due(&"order-key".into(), false);
    });
    for line in [
        "hsm_raft_voters 3\n",
        "hsm_raft_failure_tolerance 0\n",
        "hsm_disk_free_bytes 1073741824\n",
        "hsm_disk_below_reserve 1\n",
        "hsm_ready 0\n",
        "hsm_standby 1\n",
        "hsm_clock_seconds 1700000000.25\n",
        "hsm_certificate_not_after_seconds{listener=\"api\"} 1800000000\n",
        "hsm_key_rotation_due{context=\"2fa\"} 1\n",
        "hsm_key_rotation_due{context=\"order-key\"} 0\n",
        "hsm_keys_known_to_removed{kind=\"version\"} 2\n",
        "hsm_keys_known_to_removed{kind=\"transport\"} 1\n",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let open = without_names(&text);
    for line in [
        "hsm_clock_seconds 1700000000.25\n",
        "hsm_certificate_not_after_seconds{listener=\"api\"} 1800000000\n",
        "hsm_key_rotation_due 2\n",
    ] {
        assert!(open.contains(line), "{line} is not in\n{open}");
    }
    let elsewhere = rendered(|| voters(3, None));
    assert!(
        elsewhere.contains("hsm_raft_failure_tolerance -1\n"),
        "{elsewhere}"
    );
}

#[test]
fn a_slot_or_node_is_in_one_state_at_a_time() {
    let slot: Arc<str> = "exchange".into();
    let text = rendered(|| {
        slot_state(&slot, "ready");
        slot_state(&slot, "failed");
        role("leader");
        keys_missing(&slot, 2);
        slot_unconfigured(&slot, true);
        slot_unconfigured(&slot, false);
        slot_unconfigured(&"old".into(), true);
        token_call(Arc::clone(&slot), "encrypt", true, Duration::from_micros(20));
        slot_job(Arc::clone(&slot), "encrypt", Duration::from_micros(150));
    });
    assert!(text.contains("hsm_slot_state{slot=\"exchange\",state=\"failed\"} 1"));
    assert!(text.contains("hsm_slot_state{slot=\"exchange\",state=\"ready\"} 0"));
    assert!(text.contains("hsm_raft_role{role=\"leader\"} 1"));
    assert!(text.contains("hsm_raft_role{role=\"uninitialised\"} 0"));
    assert!(text.contains("hsm_keys_missing{slot=\"exchange\"} 2"));
    assert!(text.contains("hsm_slot_unconfigured{slot=\"exchange\"} 0"));
    assert!(text.contains("hsm_slot_unconfigured{slot=\"old\"} 1"));
    assert!(text.contains(
        "hsm_token_call_duration_seconds_bucket{slot=\"exchange\",op=\"encrypt\",le=\"0.00005\"} 1"
    ));
    let job = |le: &str| {
        format!("hsm_slot_job_duration_seconds_bucket{{slot=\"exchange\",operation=\"encrypt\",le=\"{le}\"}}")
    };
    assert!(text.contains(&format!("{} 0", job("0.0001"))) && text.contains(&format!("{} 1", job("0.0002"))));
}
