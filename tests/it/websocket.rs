//! WebSocket through two sidecars, with a client and a server on github.com/coder/websocket: every kind of message and
//! of end; and tunnels end when policy no longer admits them.

use crate::agent::{go, go_server, heard};
use crate::harness::{Running, field};
use crate::pair::{Extra, Pair, Way, all_well};

async fn websocket_origin() -> (Running, std::net::SocketAddr) {
    go_server(go("websocket-peer").arg("server")).await
}

#[tokio::test]
async fn messages_of_all_kinds_and_the_close_code() {
    let (mut origin, at) = websocket_origin().await;
    let mut pair = Pair::plain(at).await;
    for more in [&[][..], &["-compress"]] {
        let to = pair.address.to_string();
        let arguments =
            ["client", "-to", &to, "-path", "/echo?room=1", "-host", "chat.example", "-header", "X-Test: yes"];
        let lines = all_well(go("websocket-peer").args(arguments).args(more)).await;
        assert_eq!((&lines[0]["status"], &lines[0]["subprotocol"]), (&101.into(), &"echo.test".into()), "{}", lines[0]);
        let steps: Vec<_> = lines[1..].iter().map(|line| line["step"].as_str().unwrap()).collect();
        assert_eq!(steps, ["text", "binary", "empty", "large", "many", "ping", "close"]);
        let open = heard(&mut origin, "the handshake", |line| line["event"] == "open").await;
        assert_eq!((&open["target"], &open["host"]), (&"/echo?room=1".into(), &"chat.example".into()), "{open}");
        assert_eq!(open["headers"]["X-Test"], "yes", "{open}");
        assert_eq!(open["headers"]["Sec-Websocket-Version"], "13", "{open}");
        let closed = heard(&mut origin, "the close", |line| line["event"] == "closed").await;
        assert_eq!((&closed["code"], &closed["messages"]), (&4007.into(), &206.into()), "{closed}");
        let record = pair.server.request("the tunnel", |line| line["status"] == 101).await;
        assert_eq!(record["cause"], "done", "{record}");
        let least = if more.is_empty() { 1 << 20 } else { 1 << 14 };
        assert!(record["bytes_sent"].as_u64().unwrap() > least, "{record}");
    }
}

#[tokio::test]
async fn an_origin_that_refuses_is_heard() {
    let (_origin, at) = websocket_origin().await;
    let pair = Pair::plain(at).await;
    let mut client = go("websocket-peer");
    client.args(["client", "-to", &pair.address.to_string(), "-path", "/refuse"]);
    let (code, lines) = crate::agent::run(&mut client).await;
    assert_eq!((code, &lines[0]["status"]), (1, &403.into()), "{lines:?}");
    // So is one that does not understand: no tunnel then.
    for way in pair.ways().await {
        let upgrade = "GET /echo HTTP/1.1\r\nHost: a.example\r\nUpgrade: nonsense\r\nConnection: Upgrade\r\n\r\n";
        let next = "GET /refuse HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";
        let answer = way.send([upgrade, next].concat().as_bytes()).await;
        assert!(!answer.starts_with("HTTP/1.1 101"), "{}: {answer}", way.name());
    }
}

#[tokio::test]
async fn an_upgrade_to_http_2_is_not_made() {
    let (_origin, at) = crate::pair::http_origin().await;
    let pair = Pair::plain(at).await;
    let upgrade = "GET /echo HTTP/1.1\r\nHost: a.example\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\nConnection: close, Upgrade, HTTP2-Settings\r\n\r\n";
    for way in pair.ways().await {
        let answer = crate::pair::Answer::parse(&way.send(upgrade.as_bytes()).await);
        assert!([200, 400, 403].contains(&answer.status), "{}: {answer:?}", way.name());
        let headers = answer.json()["headers"].to_string().to_lowercase();
        assert!(!headers.contains("h2c") && !headers.contains("http2-settings"), "{}: {headers}", way.name());
    }
}

#[tokio::test]
async fn an_open_tunnel_ends_when_policy_no_longer_admits_it() {
    let (mut origin, at) = websocket_origin().await;
    let policy = "policy:\n  rules:\n    - name: chat\n      from: ['spiffe://a.example/client']\n      to: [in]\n      http: [{ methods: [GET], paths: [/echo] }]\n";
    let mut pair = Pair::start(at, Extra { server: policy, ruled: true, ..Extra::default() }).await;
    let mut client = go("websocket-peer");
    let mut client = Running::start(client.args(["client", "-hold", "-to", &pair.address.to_string()]));
    let open = heard(&mut client, "an open tunnel", |line| line["event"] == "open").await;
    assert_eq!(open["ok"], true, "{open}");
    let in_flight = pair.server.metrics().await.sum("portcullis_http_requests_in_flight", &[("direction", "inbound")]);
    assert_eq!(in_flight, 1.0);
    // Something else changes: the tunnel stays.
    pair.server.reloaded(&format!("{}telemetry: {{ access_log: true }}\n", pair.server_config)).await;
    assert!(client.heard().iter().all(|line| field(line, "event").as_deref() != Some("ended")));
    pair.server.reloaded(&pair.server_config.replace("paths: [/echo]", "paths: [/elsewhere]")).await;
    heard(&mut client, "the end", |line| line["event"] == "ended").await;
    heard(&mut origin, "the end", |line| line["event"] == "closed").await;
    pair.server.request("the tunnel's end", |line| line["cause"] == "policy_changed").await;
    let mut again = go("websocket-peer");
    let (code, lines) = crate::agent::run(again.args(["client", "-to", &pair.address.to_string()])).await;
    assert_eq!((code, &lines[0]["status"]), (1, &403.into()), "{lines:?}");
    assert_eq!(Way::Plain(pair.address).request("GET /echo HTTP/1.1\r\nHost: a.example").await.status, 403);
}
