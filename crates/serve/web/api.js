// Talking to the server: JSON requests with the key if there is one, and streams of server-sent events.

const KEY = 'cyrene.key';

export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  localStorage.setItem(KEY, key);
}

export async function getJson(path) {
  const response = await fetch(path, { headers: headers(), cache: 'no-store' });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

// Yields {type: 'text', text}, {type: 'line', line} and at last {type: 'finish', reason}.
export async function* chat(body, signal) {
  const response = await fetch('/v1/chat/completions', {
    method: 'POST',
    headers: { ...headers(), 'content-type': 'application/json' },
    body: JSON.stringify({ ...body, stream: true, cyrene_lines: true }),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const { event, data } of events(response.body)) {
    if (data === '[DONE]') return;
    const value = JSON.parse(data);
    if (value.error) throw new RequestError(value.error.message, 500);
    if (event === 'line') {
      yield { type: 'line', line: value };
      continue;
    }
    const choice = value.choices[0];
    if (choice?.delta?.content) yield { type: 'text', text: choice.delta.content };
    if (choice?.finish_reason) yield { type: 'finish', reason: choice.finish_reason };
  }
  throw new RequestError('the stream broke off', 0);
}

// The events of a stream: blocks end with an empty line, a chunk may end anywhere.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      let end;
      while ((end = buffer.indexOf('\n\n')) >= 0) {
        const event = parse(buffer.slice(0, end));
        buffer = buffer.slice(end + 2);
        if (event.data !== '') yield event;
      }
    }
  } finally {
    // Leaving early tells the server to stop.
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = { event: 'message', data: '' };
  const data = [];
  for (const line of block.split('\n')) {
    if (line.startsWith('event:')) event.event = line.slice(6).trim();
    if (line.startsWith('data:')) data.push(line.slice(5).trimStart());
  }
  event.data = data.join('\n');
  return event;
}

async function refusal(response) {
  let message = `HTTP ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not the server's own answer (a proxy's, say): the status has to do.
  }
  return new RequestError(message, response.status);
}

function headers() {
  const key = localStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}
