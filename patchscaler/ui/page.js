// What Python cannot do from its side: a brush on the Qmap, announcements for screen readers, and scrolling to the results.
() => {
  const find = (selector) => document.querySelector(selector);
  const SEND_EVERY = 80; // ms between two states of a growing stroke
  const SEND_MOST = 600; // points: its end, for what came before was sent already

  // The brush. Gradio tells of clicks only. A stroke is sent by a hidden button, in shares of the
  // picture's sides.
  let stroke = null, sent = 0, drawn = false;

  const mode = () => find("#mode input:checked")?.value;

  // Where the pointer is in the picture, which lies in the middle of its frame; null beside it.
  const place = (event) => {
    const picture = find("#qmap img");
    if (!picture?.naturalWidth) return null;
    const box = picture.getBoundingClientRect();
    const scale = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight);
    const [width, height] = [picture.naturalWidth * scale, picture.naturalHeight * scale];
    const x = (event.clientX - box.left - (box.width - width) / 2) / width;
    const y = (event.clientY - box.top - (box.height - height) / 2) / height;
    return x >= 0 && x <= 1 && y >= 0 && y <= 1 ? [+x.toFixed(4), +y.toFixed(4)] : null;
  };

  const send = () => {
    window.patchscalerStroke = JSON.stringify(stroke.slice(-SEND_MOST));
    find("#stroke").click();
    sent = performance.now();
  };

  document.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.target.closest?.("#qmap") || mode() === "inspect") return;
    const point = place(event);
    drawn = false;
    if (point) stroke = [point];
  });
  document.addEventListener("pointermove", (event) => {
    if (!stroke) return;
    for (const moved of event.getCoalescedEvents?.() ?? [event]) {
      const point = place(moved), last = stroke[stroke.length - 1];
      if (!point) continue;
      // Between two events a quick hand leaps over patches: fill in.
      const leaps = Math.ceil(Math.hypot(point[0] - last[0], point[1] - last[1]) / 0.01);
      for (let i = 1; i <= leaps; i++) {
        stroke.push([0, 1].map((axis) => +(last[axis] + (point[axis] - last[axis]) * i / leaps).toFixed(4)));
      }
    }
    if (stroke.length > 1 && performance.now() - sent > SEND_EVERY) send();
  });
  for (const name of ["pointerup", "pointercancel"]) {
    document.addEventListener(name, () => {
      const painted = stroke?.length > 1;
      if (painted) send();
      drawn = painted; // after the hidden button's click, which is one too
      stroke = null;
    });
  }
  // The click at the end of a stroke would be answered from the groups before it, and undo it.
  document.addEventListener("click", (event) => {
    if (drawn && event.target.closest?.("#qmap")) event.stopPropagation();
    drawn = false;
  }, true);
  document.addEventListener("dragstart", (event) => {
    if (event.target.closest?.("#qmap")) event.preventDefault(); // the browser would carry the picture away
  });

  // On a phone the results lie below the controls.
  document.addEventListener("click", (event) => {
    if (event.target.closest?.("#run") && window.innerWidth < 768) find("#status").scrollIntoView({behavior: "smooth"});
  });

  // For screen readers: changes are announced, and the examples' buttons, which have a picture only, get a name. Parts of
  // the page come in after this, and anew.
  const name = () => {
    for (const id of ["status", "batch-status", "stale", "note"]) find(`#${id}`)?.setAttribute("aria-live", "polite");
    for (const picture of document.querySelectorAll("#examples button:not([aria-label]) img")) {
      const file = picture.src.split("/").pop().replace(/^[0-9]+-|\.[a-z]+$/g, "");
      picture.closest("button").setAttribute("aria-label", `Example: ${file}`);
    }
  };
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
  name();
}
