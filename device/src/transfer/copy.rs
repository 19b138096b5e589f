//! An image out of a bundle: the same checks as for what a server sends, and no second tries. A medium gives the same bytes
//! again; what is wrong with it is told, and the command repeated with another copy.

use bytes::Bytes;
use fwpush_keys::{bundle::BundleError, error_text, outline::GROUP_BYTES};

use super::{Sink, SinkError, Transfer, trouble_of};
use crate::{
    agent::AgentEvent,
    bundle::BundleFile,
    limits,
    slots::Slots,
    update::{Admitted, Trouble, resume::Missing},
};

impl<S: Slots> Transfer<S> {
    /// As [`Transfer::run`], from a bundle.
    pub(crate) async fn copy(
        mut self,
        bundle: BundleFile,
        release: Admitted,
    ) -> Result<(), Trouble> {
        // The size was signed, and fits the slot: that of the outline follows from it.
        let (file, size) = (release.file_id(), release.image().size);
        let outline = bundle
            .read(move |bundle| bundle.outline(file, size))
            .await
            .map_err(unreadable)?;
        let sink = self.sink(Missing::all(outline));
        let mut sink = self.reuse(sink).await?;
        let most = limits::SCAN_BYTES as u64 / GROUP_BYTES;
        while let Some(run) = sink.missing().first_run() {
            let run = run.start..run.end.min(run.start + most);
            let range = sink.missing().bytes_of(&run);
            sink.begin(range.start, None);
            let bytes = bundle
                .read(move |bundle| {
                    let mut bytes = vec![0; (range.end - range.start) as usize];
                    bundle.read_image(range.start, &mut bytes)?;
                    Ok(Bytes::from(bytes))
                })
                .await
                .map_err(unreadable)?;
            (self.observe)(AgentEvent::Bytes(bytes.len() as u64));
            let taken;
            (sink, taken) = sink.run(move |sink| sink.take(bytes)).await?;
            if let Err(SinkError::Group { index, .. }) = &taken {
                (self.observe)(AgentEvent::GroupRefused {
                    index: *index,
                    message: "the bundle is damaged, or was made for another release".to_owned(),
                });
            }
            taken.map_err(trouble_of)?;
            sink.tell_progress();
        }
        let (_, synced) = sink.run(Sink::sync).await?;
        synced.map_err(trouble_of)
    }
}

fn unreadable(error: BundleError) -> Trouble {
    Trouble::lasting(error.code(), error_text(&error))
}
