//! The stage: an authority, the workloads and their sidecars, all in this process and on loopback.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::runtime::Handle;

use super::clinic::{Clinic, SERVICE};
use super::rotations::Rotations;
use super::scrape;
use super::workloads::Records;
use crate::accelerate::Acceleration;
use crate::app::Node;
use crate::authority::{Authority, EmbeddedSource, Options, SvidRequest};
use crate::clock::Clock;
use crate::config::{Config, LoadOptions, parse_with};
use crate::identity::{SpiffeId, TrustDomain};
use crate::proxy::inherited::Inherited;
use crate::sandbox::Sandbox;

/// The trust domain of the demo.
pub(super) const DOMAIN: &str = "demo.portcullis.example";
/// A trust domain that the demo does not know.
const ELSEWHERE: &str = "elsewhere.example";

/// How long a connection may take to end once nobody uses it.
const DRAIN: Duration = Duration::from_secs(2);

/// A SPIFFE ID of the demo, as text.
pub(super) fn id(name: &str) -> String {
    format!("spiffe://{DOMAIN}/{name}")
}

/// A sidecar that runs.
#[derive(Debug)]
pub(super) struct Sidecar {
    pub(super) name: &'static str,
    pub(super) node: Node,
    /// Its one listener.
    pub(super) listener: SocketAddr,
}

impl Sidecar {
    async fn start(name: &'static str, authority: &Authority, text: &str, traffic: Handle) -> Result<Self, String> {
        let config = config(name, text)?;
        let id = SpiffeId::parse(&id(name)).map_err(|error| error.to_string())?;
        // The DNS name is for clients that know nothing of SPIFFE, such as the one without a certificate.
        let request = SvidRequest { dns_names: vec!["localhost".into()], ..SvidRequest::new(id) };
        let source = EmbeddedSource::new(authority.clone(), request).map_err(|error| error.to_string())?;
        let clock = authority.clock().clone();
        // Several sidecars share this process, and with them the workloads that stand in for real ones.
        let node = Node::start(
            config,
            Box::new(source),
            clock,
            traffic,
            Inherited::none(),
            Sandbox::off(),
            Acceleration::off(),
        )
        .await?;
        let listener = node.proxy().listeners().first().and_then(|listener| listener.address.parse().ok());
        let listener = listener.ok_or_else(|| format!("the sidecar of {name} has no listener"))?;
        Ok(Self { name, node, listener })
    }

    /// `/state`.
    pub(super) async fn state(&self) -> Value {
        scrape::state(self.node.admin()).await
    }

    /// `/metrics`.
    pub(super) async fn metrics(&self) -> scrape::Metrics {
        scrape::metrics(self.node.admin()).await
    }
}

/// Everything that runs.
#[derive(Debug)]
pub(super) struct World {
    pub(super) authority: Authority,
    /// An authority that calls itself the same and is another.
    pub(super) forger: Authority,
    /// The authority of an unknown trust domain.
    pub(super) elsewhere: Authority,
    pub(super) workload: Records,
    pub(super) records: Sidecar,
    pub(super) frontend: Sidecar,
    pub(super) stranger: Sidecar,
    pub(super) clinic_service: Clinic,
    pub(super) clinic: Sidecar,
    pub(super) web: Sidecar,
    /// How long an SVID lives.
    pub(super) life: Duration,
    /// The rotations of the records and the frontend sidecar.
    pub(super) rotations: Rotations,
}

impl World {
    /// Starts it all; the sidecars have their identities a moment later.
    pub(super) async fn start(authority: Authority, life: Duration, traffic: &Handle) -> Result<Self, String> {
        let clock = authority.clock().clone();
        let workload = Records::start().await.map_err(|error| format!("the records workload: {error}"))?;
        let records = Sidecar::start(
            "records",
            &authority,
            &records_text(life, workload.address, &["frontend"]),
            traffic.clone(),
        )
        .await?;
        let clinic_service = Clinic::start().await.map_err(|error| format!("the clinic workload: {error}"))?;
        let text = clinic_text(life, clinic_service.address);
        let clinic = Sidecar::start("clinic", &authority, &text, traffic.clone()).await?;
        let caller = async |name: &'static str, of: &Sidecar, protocol: &str| {
            let text = caller_text(name, life, of, protocol);
            Sidecar::start(name, &authority, &text, traffic.clone()).await
        };
        let frontend = caller("frontend", &records, "tcp").await?;
        let stranger = caller("stranger", &records, "tcp").await?;
        let web = caller("web", &clinic, "http").await?;
        let rotations = Rotations::watch([&records, &frontend].map(|sidecar| (sidecar.name, sidecar.node.admin())));
        Ok(Self {
            forger: open(DOMAIN, life, clock.clone())?,
            elsewhere: open(ELSEWHERE, life, clock)?,
            authority,
            workload,
            records,
            frontend,
            stranger,
            clinic_service,
            clinic,
            web,
            life,
            rotations,
        })
    }

    /// All sidecars.
    pub(super) fn sidecars(&self) -> [&Sidecar; 5] {
        [&self.records, &self.frontend, &self.stranger, &self.clinic, &self.web]
    }

    /// The config of the records sidecar that admits these.
    pub(super) fn admitting(&self, names: &[&str]) -> Result<Config, String> {
        config("records", &records_text(self.life, self.workload.address, names))
    }

    /// A request for an identity that one of the other authorities issues.
    pub(super) fn request(authority: &Authority, name: &str) -> Result<SvidRequest, String> {
        let text = format!("spiffe://{}/{name}", authority.trust_domain().as_str());
        SpiffeId::parse(&text).map(SvidRequest::new).map_err(|error| error.to_string())
    }

    /// Waits for open connections to end, and ends those that do not.
    pub(super) async fn drain(&self) {
        let [a, b, c, d, e] = self.sidecars().map(|sidecar| sidecar.node.proxy().drain(DRAIN));
        tokio::join!(a, b, c, d, e);
    }
}

/// An authority in memory.
pub(super) fn open(domain: &str, life: Duration, clock: Clock) -> Result<Authority, String> {
    let domain = TrustDomain::parse(domain).map_err(|error| error.to_string())?;
    let options = Options { svid_ttl: life, ..Options::new(domain) };
    Authority::open(options, clock).map_err(|error| error.to_string())
}

fn config(name: &str, text: &str) -> Result<Config, String> {
    // What the environment says of a SPIFFE socket is not for the demo.
    let loaded = parse_with(text, name, &LoadOptions::default()).map_err(|errors| errors.to_string())?;
    Ok(loaded.config)
}

fn common(name: &str, life: Duration) -> String {
    format!(
        "identity: {{ authority: {{ spiffe_id: '{}', svid_ttl: {}s }} }}\n\
         labels: {{ service_name: {name}, environment: demo, domain: demo }}\n\
         admin: {{ listen: '127.0.0.1:0' }}\n",
        id(name),
        life.as_secs()
    )
}

fn records_text(life: Duration, to: SocketAddr, allow: &[&str]) -> String {
    let allow = allow.iter().map(|name| format!("'{}'", id(name))).collect::<Vec<_>>().join(", ");
    format!(
        "{}inbound:\n  - name: api\n    listen: '127.0.0.1:0'\n    to: '{to}'\n    proxy_protocol: v2\n    allow: [{allow}]\n",
        common("records", life)
    )
}

fn clinic_text(life: Duration, to: SocketAddr) -> String {
    let web = id("web");
    format!(
        "{}inbound:
  - name: clinic
    listen: '127.0.0.1:0'
    to: '{to}'
    protocol: http
    http: {{ forward_client_cert: set }}
policy:
  rules:
    - name: read-patients
      from: ['{web}']
      http: [{{ methods: [GET], paths: ['/patients/{{id}}'] }}]
    - name: book
      from: ['{web}']
      http: [{{ grpc: {{ service: {SERVICE}, method: Book }} }}]
    - name: no-admin
      from: ['spiffe://{DOMAIN}']
      action: deny
      http: [{{ paths: [{{ prefix: /admin }}] }}]
",
        common("clinic", life)
    )
}

fn caller_text(name: &str, life: Duration, of: &Sidecar, protocol: &str) -> String {
    format!(
        "{}outbound:\n  - name: {name}\n    listen: '127.0.0.1:0'\n    to: '{}'\n    expect: {}\n    protocol: {protocol}\n",
        common(name, life),
        of.listener,
        id(of.name)
    )
}
