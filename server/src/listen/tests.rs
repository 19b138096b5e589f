use axum::routing::get;
use fwpush_keys::{
    Ca, Identity, SanName, TrustDomain, new_key_and_csr,
    tls::{Bar, Credentials},
};
use rustls::{pki_types::ServerName, time_provider::DefaultTimeProvider};
use tokio::{net::TcpSocket, sync::Notify};
use tokio_rustls::{TlsConnector, client};

use super::*;
use crate::db::testing::Bench;

const SOON: Duration = Duration::from_secs(60);

#[test]
fn silence_is_borne_for_a_shorter_time_the_fewer_places_are_free() {
    assert_eq!(patience(100, 100), limits::HANDSHAKE_TIME);
    assert!(patience(50, 100) < limits::HANDSHAKE_TIME);
    assert_eq!(patience(0, 100), limits::LEAST_PATIENCE);
}

/// Settings of a server and of a client, which is a node as well.
fn both_sides() -> (rustls::ServerConfig, rustls::ClientConfig) {
    let domain: TrustDomain = "test".parse().unwrap();
    let now = Timestamp::now();
    let ca = Ca::generate(Role::Node, &domain, now, 1).unwrap();
    let authority = || tls::certificates_from_pem(&ca.cert_pem()).unwrap();
    let (key, csr) = new_key_and_csr().unwrap();
    let node = Identity::node(&domain, &"n".parse().unwrap());
    let names = [SanName::Dns("localhost".to_owned())];
    let certificate = ca.issue_for_csr(&csr, &node, &names, now, 1).unwrap();
    let own = || Credentials::from_pem(&certificate, &key).unwrap();
    let time = Arc::new(DefaultTimeProvider);
    (
        tls::server_config(own(), &[(Role::Node, authority())], &domain, Bar::none()).unwrap(),
        tls::client_config(own(), authority(), &domain, time).unwrap(),
    )
}

// HTTP/2 (RFC 9113), as much as one request needs.
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_OF_STREAM_AND_HEADERS: u8 = 5;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

async fn next_frame(io: &mut client::TlsStream<TcpStream>) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    io.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    io.read_exact(&mut payload).await?;
    Ok((head[3], payload))
}

/// More than the receiver's buffer takes, and less than the sender's.
const ANSWER: usize = 400_000;

/// As soon as everything is sent, the server is done; the peer has read nothing yet, and says something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_ends_in_a_drain_is_received_whole_by_a_peer_that_reads_late() {
    let bench = Bench::new().await;
    let (server_tls, client_tls) = both_sides();
    let go = Arc::new(Notify::new());
    let gone = go.clone();
    let app = Router::new().route(
        "/",
        get(async move || {
            gone.notified().await;
            vec![7; ANSWER]
        }),
    );
    let listener = Listener {
        name: "operators",
        tls: Arc::new(ArcSwap::from_pointee(server_tls)),
        proxies: Arc::default(),
        app,
        access: Access::new(bench.db.clone(), []),
        connections: 10,
        handshakes_per_address: 10,
    };
    let socket = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = socket.local_addr().unwrap();
    let stop = Stop::default();
    let mut serving = tokio::spawn(serve(socket, Arc::new(listener), stop.clone()));

    let tcp = TcpSocket::new_v4().unwrap();
    tcp.set_recv_buffer_size(8 << 10).unwrap();
    let tcp = tcp.connect(address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let connector = TlsConnector::from(Arc::new(client_tls));
    let mut io = connector.connect(name, tcp).await.unwrap();
    let window = (16u32 << 20).to_be_bytes();
    // GET / by the static table, from `:authority: a`.
    let request = [0x82, 0x87, 0x84, 0x41, 1, b'a'];
    let begin = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(SETTINGS, 0, 0, &[&[0, 4], &window[..]].concat()),
        frame(WINDOW_UPDATE, 0, 0, &window),
        frame(HEADERS, END_OF_STREAM_AND_HEADERS, 1, &request),
    ]
    .concat();
    io.write_all(&begin).await.unwrap();
    loop {
        // The server has begun with the request when it has seen the settings before it.
        let (kind, payload) = next_frame(&mut io).await.unwrap();
        if kind == SETTINGS && payload.is_empty() {
            break;
        }
    }
    stop.accept.cancel();
    stop.goaway.cancel();
    loop {
        let (kind, payload) = next_frame(&mut io).await.unwrap();
        if kind == PING {
            io.write_all(&frame(PING, ACK, 0, &payload)).await.unwrap();
            break;
        }
    }
    go.notify_one();
    // A server that does not wait for its peer is gone within that time.
    let _ = timeout(Duration::from_secs(1), &mut serving).await;
    let mut received = 0;
    loop {
        // Nothing that anybody waits for.
        let _ = io.write_all(&frame(PING, 0, 0, &[0; 8])).await;
        match timeout(SOON, next_frame(&mut io)).await.unwrap() {
            Ok((DATA, payload)) => received += payload.len(),
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
                break;
            }
        }
    }
    assert_eq!(received, ANSWER);
    drop(io);
    if !serving.is_finished() {
        timeout(SOON, serving).await.unwrap().unwrap();
    }
}
