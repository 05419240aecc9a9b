//! One service behind an inbound listener, another before an outbound one: the everyday path, through two processes.

use tokio::net::TcpStream;

use crate::harness::{Domain, Proxy, echo, exchange};

#[tokio::test]
async fn two_sidecars_join_two_workloads() {
    let domain = Domain::new("a.example");
    let workload = echo().await;
    let server = Proxy::start(
        domain.path(),
        "server",
        &format!(
            "{}labels: {{ service_name: records, environment: test, domain: clinical }}\ninbound:\n  - name: api\n    listen: 127.0.0.1:0\n    to: {}\n    allow: [{}]\n",
            domain.identity("/server"),
            workload.address,
            domain.id("/client")
        ),
    )
    .await;
    server.ready().await;
    let client = Proxy::start(
        domain.path(),
        "client",
        &format!(
            "{}outbound:\n  - name: records\n    listen: 127.0.0.1:0\n    to: {}\n    expect: {}\n",
            domain.identity("/client"),
            server.address("api").await,
            domain.id("/server")
        ),
    )
    .await;
    client.ready().await;
    let mut stream = TcpStream::connect(client.address("records").await).await.unwrap();
    exchange(&mut stream, b"hello through two proxies").await.unwrap();
    let metrics = server.metrics().await;
    let labels = [
        ("direction", "inbound"),
        ("version", "TLSv1.3"),
        ("cipher_suite", "TLS_AES_256_GCM_SHA384"),
        ("group", "X25519MLKEM768"),
        ("key_type", "ecdsa-p384"),
        ("compliant", "true"),
        ("service_name", "records"),
        ("environment", "test"),
        ("domain", "clinical"),
    ];
    assert!(metrics.sum("portcullis_tls_negotiated_total", &labels) == 1.0, "{metrics:?}");
    assert_eq!(*workload.accepted.borrow(), 1);
    assert!(client.stop().await.success());
    assert!(server.stop().await.success());
}
