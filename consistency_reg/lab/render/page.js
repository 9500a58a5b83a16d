(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const views = [];
  const state = { hidden: [], wanted: "", picked: "" };
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  // --- charts
  const told = (value, sanitize) => {
    const item = data.items[value.id];
    const rows = item ? [...item.facts.slice(0, data.told), ...item.measures] : [];
    const line = ([label, text]) => `<tr><td>${sanitize(label)}</td><td>${sanitize(text)}</td></tr>`;
    const title = item ? `<h2>${sanitize(item.name)}</h2>` : "";
    const say = value.say ? `<div>${sanitize(value.say)}</div>` : "";
    return `${title}${say}<table>${rows.map(line).join("")}</table>`;
  };
  const draw = async (place) => {
    // A filter may leave a chart empty, which Vega warns of: errors alone are logged.
    const options = { actions: false, ast: true, renderer: "svg", logLevel: 1, tooltip: { formatTooltip: told } };
    const { view } = await vegaEmbed(place, data.charts[place.dataset.chart], options);
    view.addEventListener("click", (event, item) => {
      if (item && item.datum && data.items[item.datum.id]) open(item.datum.id);
    });
    views.push(view);
    if (state.wanted || state.hidden.length || state.picked) await tell(view);
  };
  const tell = (view) => {
    for (const [name, value] of Object.entries(state)) view.signal(name, value);
    return view.runAsync();
  };
  const refresh = () => {
    views.forEach(tell);
    tables.forEach((table) => table.filter());
    for (const row of document.querySelectorAll("tbody tr")) {
      row.classList.toggle("picked", state.picked !== "" && row.dataset.cell === state.picked);
    }
    const shown = document.getElementById("picked");
    shown.hidden = state.picked === "";
    shown.replaceChildren();
    if (state.picked) {
      const clear = element("button", `${state.picked} ×`, { type: "button", class: "chip", title: "show all alike" });
      clear.addEventListener("click", close);
      shown.append(clear);
    }
  };

  // --- what a click shows
  const panel = document.getElementById("detail");
  const link = (id) => {
    const made = element("button", data.items[id].name, { type: "button", class: "open" });
    made.addEventListener("click", () => open(id));
    return made;
  };
  const grid = (rows, header) => {
    const table = element("table");
    if (header) table.append(element("tr"));
    header?.forEach((name) => table.rows[0].append(element("th", name)));
    for (const row of rows) {
      const line = table.insertRow();
      row.forEach((text) => line.append(element("td", text)));
    }
    return table;
  };
  const open = (id) => {
    const item = data.items[id];
    const content = panel.querySelector("div");
    content.replaceChildren(element("h2", item.name), grid(item.facts));
    if (item.members.length) {
      const list = element("ul");
      for (const member of item.members) {
        const entry = element("li");
        entry.append(link(member));
        list.append(entry);
      }
      content.append(element("h3", item.members_title), list);
    }
    if (item.measures.length) content.append(element("h3", "Measures"), grid(item.measures, item.header));
    panel.hidden = false;
    panel.scrollTop = 0;
    state.picked = item.cell;
    history.replaceState(null, "", `#${encodeURIComponent(id)}`);
    refresh();
  };
  const close = () => {
    panel.hidden = true;
    state.picked = "";
    history.replaceState(null, "", location.pathname + location.search);
    refresh();
  };
  panel.querySelector(".close").addEventListener("click", close);
  addEventListener("keydown", (event) => event.key === "Escape" && close());

  // --- tables
  const value = (text) => {
    const found = /^[±~]?\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)/i.exec(text.trim());
    return found ? Number(found[1]) : null;
  };
  const make = (table) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const box = element("input", undefined, { type: "search", placeholder: "filter this table", "aria-label": "filter this table" });
    const count = element("span");
    const tools = element("div", undefined, { class: "tools" });
    tools.append(box, count);
    table.parentElement.before(tools);
    const filter = () => {
      const words = [box.value, state.wanted].map((text) => text.trim().toLowerCase()).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word)) || state.hidden.includes(row.dataset.group);
        shown += !row.hidden;
      }
      count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    };
    const sort = (header) => {
      const place = header.cellIndex;
      const turn = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", turn > 0 ? "ascending" : "descending");
      const key = (row) => row.cells[place].textContent.trim();
      const numeric = place > 0 && rows.some((row) => value(key(row)) !== null) &&
        rows.every((row) => key(row) === "" || key(row) === "none" || value(key(row)) !== null);
      const missing = (text) => text === "" || (numeric && value(text) === null);
      const compare = (a, b) => {
        const [one, other] = [key(a), key(b)];
        if (missing(one) || missing(other)) return missing(one) - missing(other);
        const order = numeric ? value(one) - value(other) : one.localeCompare(other, "en", { numeric: true });
        return turn * order;
      };
      body.append(...[...rows].sort(compare));
    };
    for (const header of table.tHead.rows[0].cells) {
      const button = element("button", header.textContent, { type: "button", title: "sort" });
      button.addEventListener("click", () => sort(header));
      header.replaceChildren(button);
    }
    for (const row of rows) {
      const id = row.dataset.id;
      if (id) row.cells[0].replaceChildren(Object.assign(link(id), { textContent: row.cells[0].textContent }));
    }
    box.addEventListener("input", filter);
    filter();
    return { filter };
  };
  const tables = [...document.querySelectorAll("table.data")].map(make);

  // --- the tools above
  const wanted = document.getElementById("wanted");
  wanted.addEventListener("input", () => {
    state.wanted = wanted.value.trim().toLowerCase();
    refresh();
  });
  for (const chip of document.querySelectorAll("button.chip[data-group]")) {
    chip.addEventListener("click", () => {
      const group = chip.dataset.group;
      const off = !state.hidden.includes(group);
      state.hidden = off ? [...state.hidden, group] : state.hidden.filter((other) => other !== group);
      chip.setAttribute("aria-pressed", String(!off));
      refresh();
    });
  }

  Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(() => {
    const id = decodeURIComponent(location.hash.slice(1));
    if (data.items[id]) open(id);
    document.body.dataset.ready = "yes";
  });
})();
