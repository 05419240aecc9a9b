use super::*;

#[test]
fn plaintext_is_served_by_outbound_listeners_and_by_the_workload() {
    let config = "labels: { service_name: a, environment: b, domain: c }\n\
                  identity: unix:///run/agent.sock\n\
                  inbound:\n\
                  - { name: a, listen: '127.0.0.1:8443', to: '127.0.0.1:8080' }\n\
                  - { name: b, listen: '127.0.0.1:8444', to: 'unix:///run/b.sock' }\n\
                  outbound:\n\
                  - { name: c, listen: '127.0.0.1:9001', to: 'c.example:8443', expect: 'spiffe://a.example/c' }\n\
                  - { name: d, listen: 'unix:///run/d.sock', to: 'd.example:8443', expect: 'spiffe://a.example/d' }\n\
                  intercept: { proxy: { uid: 1 }, outbound: { port: 15001 } }\n";
    let loaded = crate::config::parse(config, "test").unwrap();
    assert_eq!(plaintext_ports(&loaded.config), [8080, 9001, 15001]);
}

#[test]
fn nothing_is_tried_unless_it_is_asked_for() {
    let off = Acceleration::off();
    assert_eq!(off.report(), json!({ "mode": "off", "active": false, "refused": [] }));
}

#[cfg(feature = "ebpf")]
#[test]
fn plain_tcp_passes_every_trial() {
    assert_eq!(self_test::failed(None), []);
}
