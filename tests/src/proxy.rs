//! A TCP relay that can fall silent without closing anything, as a cut cable or a NAT that forgot does.

use std::net::SocketAddr;

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
};

/// The relay; it ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    pub address: SocketAddr,
    /// Connections made under an older number carry nothing any more.
    cut: watch::Sender<u64>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// Relays to `server`.
    pub async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, cuts) = watch::channel(0);
        let task = tokio::spawn(async move {
            let mut relays = tokio::task::JoinSet::new();
            while let Ok((device, _)) = listener.accept().await {
                relays.spawn(relay(device, server, cuts.clone()));
            }
        });
        Self { address, cut, task }
    }

    /// From here on nothing passes on the connections there are, in either direction; they stay open. New ones work.
    pub fn cut(&self) {
        self.cut.send_modify(|number| *number += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(mut device: TcpStream, server: SocketAddr, mut cuts: watch::Receiver<u64>) {
    cuts.mark_unchanged();
    let Ok(mut upstream) = TcpStream::connect(server).await else {
        return;
    };
    tokio::select! {
        _ = copy_bidirectional(&mut device, &mut upstream) => return,
        _ = cuts.changed() => {}
    }
    // Both sockets stay open, unread, until the relay is dropped.
    std::future::pending::<()>().await;
}
