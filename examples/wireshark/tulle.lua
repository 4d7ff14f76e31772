-- Tulle's datagrams in Wireshark: what the first byte of a datagram on UDP 4789 says it is, and, given the keys,
-- what is in the sealed ones. docs/wire.md and docs/wire-sealed.md have every byte. README.md says how to use it.

local aead = require "tulle_aead" -- stands beside this file

local SEALED_BYTE, HEADER_LEN, TAG_LEN = 0x04, 16, 16
local FLAG_CONTROL, KNOWN_FLAGS = 0x02, 0x03
local VXLAN_PORT = 4789

local tulle = Proto("tulle", "Tulle sealed VXLAN")

local f = {
  type = ProtoField.uint8("tulle.type", "Type", base.HEX, { [SEALED_BYTE] = "sealed VXLAN" }),
  flags = ProtoField.uint8("tulle.flags", "Flags", base.HEX),
  unfilled = ProtoField.bool("tulle.flags.unfilled", "Inner TCP or UDP checksum is not filled in", 8, nil, 0x01),
  control = ProtoField.bool("tulle.flags.control", "Control message instead of a frame", 8, nil, FLAG_CONTROL),
  reserved = ProtoField.uint16("tulle.reserved", "Reserved", base.HEX),
  session = ProtoField.uint32("tulle.session", "Session", base.HEX),
  counter = ProtoField.uint64("tulle.counter", "Counter", base.DEC),
  ciphertext = ProtoField.bytes("tulle.ciphertext", "Ciphertext"),
  length = ProtoField.uint32("tulle.ciphertext.length", "Ciphertext length", base.DEC),
  tag = ProtoField.bytes("tulle.tag", "Tag"),
  cipher = ProtoField.string("tulle.cipher", "Cipher"),
  verified = ProtoField.bool("tulle.verified", "Tag verified"),
  message = ProtoField.bytes("tulle.control", "Control message"),
  kind = ProtoField.uint8("tulle.control.type", "Type", base.DEC, { "probe of the path's MTU", "acknowledgement of a probe" }),
  id = ProtoField.uint16("tulle.control.id", "Id", base.DEC),
  size = ProtoField.uint16("tulle.control.size", "Size of the probe's IP packet", base.DEC),
}
tulle.fields = f

local groups, severities = expert.group, expert.severity
local e = {
  short = ProtoExpert.new("tulle.short", "Shorter than a header and a tag", groups.MALFORMED, severities.ERROR),
  cut = ProtoExpert.new("tulle.cut", "Not recorded whole, so it cannot be opened: capture without a limit (-s 0)",
    groups.UNDECODED, severities.NOTE),
  refused = ProtoExpert.new("tulle.refused", "A receiver refuses this header", groups.PROTOCOL, severities.WARN),
  sealed = ProtoExpert.new("tulle.unopened", "Not opened", groups.UNDECODED, severities.CHAT),
  forged = ProtoExpert.new("tulle.forged", "The tag does not verify: a wrong key, or changed on the way",
    groups.SECURITY, severities.ERROR),
  alien = ProtoExpert.new("tulle.no_vxlan", "What was in it is no VXLAN: a wrong key", groups.MALFORMED, severities.ERROR),
}
tulle.experts = e

tulle.prefs.port = Pref.uint("UDP port", VXLAN_PORT, "Where the nodes listen (--listen)")
tulle.prefs.keylog = Pref.string("Key log", "", "The file that the setting keylog names, of one of the nodes or of several joined")
tulle.prefs.verify = Pref.bool("Verify tags", true, "Off is faster, and shows what was forged as if it were not")

-- Who dissects the rest. Wireshark 4.0 gives its VXLAN dissector no name: it is who had the port before us.
local udp_ports = DissectorTable.get("udp.port")
local quic = Dissector.get("quic")
local vxlan
do
  local named, found = pcall(Dissector.get, "vxlan")
  vxlan = named and found or udp_ports:get_dissector(VXLAN_PORT)
  if vxlan and tostring(vxlan):upper() ~= "VXLAN" then vxlan = nil end
end

-- The key log. A session's index is random and chosen by its receiver, so two nodes can choose the same one: all keys
-- of an index are tried.

local keys = {}      -- by index, 8 hexadecimal digits: a list of {cipher, key}
local read_size      -- of the file when it was read
local unreadable     -- why it was not
local openers = {}   -- by cipher and key; MAX_OPENERS of them, for each has tables
local n_openers = 0
local opened = {}    -- by datagram, since Wireshark dissects what it shows again and again; MAX_OPENED of them
local n_opened = 0
local MAX_OPENERS, MAX_OPENED = 64, 2048

local function forget()
  openers, n_openers, opened, n_opened = {}, 0, {}, 0
end

local function add_key(line)
  local index, cipher, key = line:match("^TULLE_SESSION (%x+) (%S+) (%x+)%s*$")
  if not index or #index ~= 8 or #key ~= 64 or not aead.new[cipher] then return end
  index = index:lower()
  keys[index] = keys[index] or {}
  for _, k in ipairs(keys[index]) do
    if k.hex == key and k.cipher == cipher then return end
  end
  local raw = key:gsub("%x%x", function(x) return string.char(tonumber(x, 16)) end)
  table.insert(keys[index], { cipher = cipher, hex = key, raw = raw })
end

-- read_keys reads the log if it is not what was read last, and reports whether it did.
local function read_keys()
  unreadable = nil
  if tulle.prefs.keylog == "" then return false end
  local file, err = io.open(tulle.prefs.keylog, "r")
  local size = file and file:seek("end")
  if not size then
    unreadable = err or "no file"
    return false
  end
  local changed = size ~= read_size
  if changed then
    keys, read_size = {}, size
    forget()
    file:seek("set")
    for line in file:lines() do add_key(line) end
  end
  file:close()
  return changed
end

local function opener(k)
  local name = k.cipher .. k.hex
  if not openers[name] then
    if n_openers == MAX_OPENERS then openers, n_openers = {}, 0 end
    openers[name], n_openers = aead.new[k.cipher](k.raw), n_openers + 1
  end
  return openers[name]
end

-- try opens a datagram, a string of bytes, with each key of its session. It returns the plaintext, nil if no key did,
-- and the cipher; or nothing if there is no key.
local function try(index, datagram)
  local candidates = keys[index]
  if not candidates then return end
  local header, nonce = datagram:sub(1, HEADER_LEN), "\0\0\0\0" .. datagram:sub(9, HEADER_LEN)
  local text, tag = datagram:sub(HEADER_LEN + 1, -TAG_LEN - 1), datagram:sub(-TAG_LEN)
  local plaintext
  for _, k in ipairs(candidates) do
    plaintext = opener(k)(nonce, header, text, tag, tulle.prefs.verify)
    -- Without the tag the first byte has to tell one key from another.
    if plaintext and (tulle.prefs.verify or plaintext:byte(1) == 0x08) then return plaintext, k.cipher end
  end
  return plaintext, candidates[#candidates].cipher
end

-- open is try with a memory, and with a look at keys that were appended meanwhile.
local function open(index, datagram)
  local known = opened[datagram]
  if known then return known.plaintext, known.cipher end
  local plaintext, cipher = try(index, datagram)
  if not plaintext and read_keys() then plaintext, cipher = try(index, datagram) end
  if plaintext then
    if n_opened == MAX_OPENED then opened, n_opened = {}, 0 end
    opened[datagram], n_opened = { plaintext = plaintext, cipher = cipher }, n_opened + 1
  end
  return plaintext, cipher
end

-- add_header shows the 16 bytes that anybody can read, and returns the flags.
local function add_header(tvb, tree)
  local flags, reserved, high = tvb(1, 1):uint(), tvb(2, 2), tvb(8, 4):uint()
  tree:add(f.type, tvb(0, 1))
  local item = tree:add(f.flags, tvb(1, 1))
  item:add(f.unfilled, tvb(1, 1))
  item:add(f.control, tvb(1, 1))
  if flags > KNOWN_FLAGS then item:add_proto_expert_info(e.refused, "Flags that there are not: a receiver refuses this") end
  item = tree:add(f.reserved, reserved)
  if reserved:uint() ~= 0 then item:add_proto_expert_info(e.refused, "Reserved bytes that are not zero: a receiver refuses this") end
  tree:add(f.session, tvb(4, 4))
  item = tree:add(f.counter, tvb(8, 8))
  if high ~= 0 then item:add_proto_expert_info(e.refused, "A counter of 2^32 or more: a receiver refuses this") end
  return flags
end

-- add_unopened says why there is nothing to see of what is inside.
local function add_unopened(tree, cipher)
  if cipher then
    tree:add(f.verified, false):set_generated()
    tree:add_proto_expert_info(e.forged)
  elseif tulle.prefs.keylog == "" then
    tree:add_proto_expert_info(e.sealed, "Not opened: no key log (preference tulle.keylog)")
  elseif unreadable then
    tree:add_proto_expert_info(e.sealed, "Not opened: the key log cannot be read: " .. unreadable)
  else
    tree:add_proto_expert_info(e.sealed, "Not opened: the key log has no key for this session")
  end
end

-- show_control shows a message between two nodes: type (1) | 0 | id (2) | size (2) | padding.
local function show_control(inner, pinfo, tree)
  local item = tree:add(f.message, inner())
  pinfo.cols.info:append(", control")
  if inner:len() < 6 then return end
  item:add(f.kind, inner(0, 1))
  item:add(f.id, inner(2, 2))
  item:add(f.size, inner(4, 2))
end

-- show_inner hands what was in a datagram to who knows it.
local function show_inner(plaintext, flags, pinfo, tree, root)
  if #plaintext == 0 then
    tree:add_proto_expert_info(e.alien)
    return
  end
  local inner = ByteArray.new(plaintext, true):tvb("Opened by Tulle")
  if flags % (2 * FLAG_CONTROL) >= FLAG_CONTROL then
    show_control(inner, pinfo, tree)
  elseif plaintext:byte(1) ~= 0x08 then
    tree:add_proto_expert_info(e.alien)
  elseif vxlan then
    vxlan:call(inner, pinfo, root)
  end
end

local function dissect_sealed(tvb, pinfo, root)
  pinfo.cols.protocol = "Tulle"
  local whole, captured = tvb:reported_len(), tvb:len()
  local tree = root:add(tulle, tvb())
  if whole < HEADER_LEN + TAG_LEN or captured < HEADER_LEN then
    pinfo.cols.info = "Sealed VXLAN, cut short"
    tree:add_proto_expert_info(whole < HEADER_LEN + TAG_LEN and e.short or e.cut)
    return captured
  end
  local flags, length = add_header(tvb, tree), whole - HEADER_LEN - TAG_LEN
  local index = string.format("%08x", tvb(4, 4):uint())
  pinfo.cols.info = string.format("Sealed VXLAN, session %s, counter %s, %d bytes", index, tostring(tvb(8, 8):uint64()), length)
  tree:append_text(", session " .. index)
  tree:add(f.length, length):set_generated()
  if captured < whole then
    tree:add_proto_expert_info(e.cut)
    return captured
  end
  if length > 0 then tree:add(f.ciphertext, tvb(HEADER_LEN, length)) end
  tree:add(f.tag, tvb(HEADER_LEN + length, TAG_LEN))
  local plaintext, cipher = open(index, tvb:raw(0, whole))
  if cipher then tree:add(f.cipher, cipher):set_generated() end
  if not plaintext then
    add_unopened(tree, cipher)
    return captured
  end
  if tulle.prefs.verify then tree:add(f.verified, true):set_generated() end
  show_inner(plaintext, flags, pinfo, tree, root)
  return captured
end

-- What belongs to none of these is not ours: a node drops it, and Wireshark shows it as data.
function tulle.dissector(tvb, pinfo, root)
  if tvb:len() == 0 then return 0 end
  local first = tvb(0, 1):uint()
  if first == SEALED_BYTE then
    return dissect_sealed(tvb, pinfo, root)
  elseif vxlan and (first == 0x08 or first == 0x88) then
    return vxlan:call(tvb, pinfo, root)
  elseif quic and first % 0x80 >= 0x40 then
    return quic:call(tvb, pinfo, root)
  end
  return 0
end

local port -- that we are registered on
local function listen()
  if port == tulle.prefs.port then return end
  if port then
    udp_ports:remove(port, tulle)
    if port == VXLAN_PORT and vxlan then udp_ports:add(port, vxlan) end
  end
  port = tulle.prefs.port
  udp_ports:add(port, tulle)
end
listen()

function tulle.prefs_changed()
  listen()
  keys, read_size = {}, nil
  forget()
end

-- Another capture: the key log may be another one of the same length.
function tulle.init()
  keys, read_size = {}, nil
  forget()
end
