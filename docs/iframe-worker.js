// Browsers start no worker for a page from a folder (file://). There the script of the search runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.inner = new Promise((ready, failed) => {
        const script = inner.document.createElement("script");
        Object.assign(script, { src: url, onload: () => ready(inner), onerror: failed });
        inner.document.documentElement.append(script);
      });
    }

    async postMessage(data) {
      const inner = await this.inner;
      inner.dispatchEvent(new inner.MessageEvent("message", { data }));
    }
  };
}
