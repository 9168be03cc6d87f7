// Loads a tile: its weights, and of each output bias and shifts (load_word of m3vit_engine_linear.h). The rows of a tile
// are one run of addresses, the tiles of a map follow one another, and so do the maps of an expert.
//
// `start` asks for all of it; a word of weights from each port and one of parameters is taken at each `step` for which
// `ready` is up, while there is `more`. What is taken goes out a cycle later, with where it belongs.
module m3vit_load #(
    parameter int ADDRESS_BITS = 40,
    parameter int PORT_BITS = 128,
    parameter int W_BITS = 8,
    parameter int NARROW = 16,      // values of a narrow word: columns of the parameters
    parameter int TILE_OUT = 16,
    parameter int BANKS = 1,
    parameter int DEPTH = 64,       // words of a bank, of one tile
    parameter int PORTS = 1,
    parameter int PARAMS = 8,       // rows of parameters of a tile
    localparam int ROW = DEPTH > 1 ? $clog2(DEPTH) : 1,
    localparam int PARAM = PARAMS > 1 ? $clog2(PARAMS) : 1
) (
    input  logic                       clk,
    input  logic                       reset,
    input  logic                       start,
    input  logic                       fresh,          // the first tile of a block,
    input  logic                       again,          // which is not the map's first: the weights once more
    input  logic                       second,         // map
    input  logic [               15:0] inputs,
    input  logic [               15:0] outputs,
    input  logic [   ADDRESS_BITS-1:0] weights,        // bytes: of the expert
    input  logic [   ADDRESS_BITS-1:0] params,
    output logic                       more,
    output logic                       ready,
    input  logic                       step,
    output logic [       TILE_OUT-1:0] write_output,
    output logic [          BANKS-1:0] write_bank,
    output logic [            ROW-1:0] write_at,
    output logic [BANKS*PORT_BITS-1:0] write_data,
    output logic [         NARROW-1:0] write_params,   // columns
    output logic [          PARAM-1:0] params_at,
    output logic [      NARROW*64-1:0] params_data,
    output logic [          PORTS-1:0] arvalid,
    input  logic [          PORTS-1:0] arready,
    output logic [ PORTS*ADDRESS_BITS-1:0] araddr,
    output logic [        PORTS*8-1:0] arlen,
    input  logic [          PORTS-1:0] rvalid,
    output logic [          PORTS-1:0] rready,
    input  logic [PORTS*PORT_BITS-1:0] rdata,
    output logic                       params_arvalid,
    input  logic                       params_arready,
    output logic [   ADDRESS_BITS-1:0] params_araddr,
    output logic [                7:0] params_arlen,
    input  logic                       params_rvalid,
    output logic                       params_rready,
    input  logic [      PORT_BITS-1:0] params_rdata
);
    localparam int BYTES = PORT_BITS / 8;
    localparam int SHIFT = $clog2(BYTES);
    localparam int LANES = PORT_BITS / W_BITS;
    localparam int ROWS = PORT_BITS / 64;  // of parameters in a word

    logic [ADDRESS_BITS-1:0] at, map_at, params_next, params_map, row_bytes, params_bytes;
    logic [15:0] words, param_words;       // of a row; of the tile
    logic [15:0] asked;                    // rows
    logic [PORTS-1:0] asking, accepted, valid, pop;
    logic [PORTS*PORT_BITS-1:0] word;
    logic params_asking, params_accepted, params_valid, params_pop;
    logic [PORT_BITS-1:0] params_word;
    logic [15:0] row, w, bank, column, param;
    logic [ROW-1:0] bank_at;
    logic [PARAM-1:0] param_at;
    logic rows_left, params_left, row_ends;

    assign words = inputs / 16'(LANES);
    assign row_bytes = ADDRESS_BITS'(words) << SHIFT;
    assign param_words = (outputs + 16'(ROWS - 1)) / 16'(ROWS);
    assign params_bytes = ADDRESS_BITS'(param_words) << SHIFT;
    assign rows_left = row < outputs;
    assign params_left = param < param_words;
    assign more = rows_left || params_left;
    assign row_ends = w + 16'(PORTS) >= words;
    always_comb begin
        ready = !params_left || params_valid;
        for (int p = 0; p < PORTS; p++) begin
            if (rows_left && w + 16'(p) < words && !valid[p]) ready = 0;
            pop[p] = step && rows_left && w + 16'(p) < words;
        end
        params_pop = step && params_left;
    end

    // Requests: a row of weights at a time from each port, and the parameters of the tile.
    for (genvar p = 0; p < PORTS; p++) begin : port
        m3vit_axi_read #(
            .ADDRESS_BITS(ADDRESS_BITS),
            .DATA_BITS(PORT_BITS),
            .STRIDE(PORTS)
        ) read (
            .clk(clk),
            .reset(reset),
            .command_valid(asking[p]),
            .command_ready(accepted[p]),
            .command_first(at + ADDRESS_BITS'(p * BYTES)),
            .command_words((words + 16'(PORTS - 1 - p)) / 16'(PORTS)),
            .word(word[p*PORT_BITS+:PORT_BITS]),
            .word_valid(valid[p]),
            .held(),
            .pop(pop[p]),
            .arvalid(arvalid[p]),
            .arready(arready[p]),
            .araddr(araddr[p*ADDRESS_BITS+:ADDRESS_BITS]),
            .arlen(arlen[p*8+:8]),
            .rvalid(rvalid[p]),
            .rready(rready[p]),
            .rdata(rdata[p*PORT_BITS+:PORT_BITS])
        );
    end
    m3vit_axi_read #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .DATA_BITS(PORT_BITS)
    ) params_read (
        .clk(clk),
        .reset(reset),
        .command_valid(params_asking),
        .command_ready(params_accepted),
        .command_first(params_next),
        .command_words(param_words),
        .word(params_word),
        .word_valid(params_valid),
        .held(),
        .pop(params_pop),
        .arvalid(params_arvalid),
        .arready(params_arready),
        .araddr(params_araddr),
        .arlen(params_arlen),
        .rvalid(params_rvalid),
        .rready(params_rready),
        .rdata(params_rdata)
    );
    always_ff @(posedge clk) begin
        if (reset) begin
            asking <= 0;
            params_asking <= 0;
        end else if (start) begin
            asking <= {PORTS{1'b1}};
            params_asking <= 1;
        end else begin
            for (int p = 0; p < PORTS; p++) if (accepted[p]) asking[p] <= 0;
            if ((asking & ~accepted) == 0 && asking != 0 && asked + 1 < outputs) asking <= {PORTS{1'b1}};
            if (params_accepted) params_asking <= 0;
        end
        if (start) begin
            asked <= 0;
            if (fresh && again) begin
                at <= map_at;
                params_next <= params_map;
            end else if (fresh && !second) begin
                at <= weights;
                map_at <= weights;
                params_next <= params;
                params_map <= params;
            end else if (fresh) begin
                map_at <= at;
                params_map <= params_next;
            end
        end else begin
            if (asking != 0 && (asking & ~accepted) == 0) begin
                asked <= asked + 1;
                at <= at + row_bytes;
            end
            if (params_accepted) params_next <= params_next + params_bytes;
        end
    end

    // What has come.
    always_ff @(posedge clk) begin
        if (start) begin
            row <= 0;
            w <= 0;
            bank <= 0;
            bank_at <= 0;
            param <= 0;
            column <= 0;
            param_at <= 0;
        end else if (step) begin
            if (rows_left) begin
                w <= row_ends ? 0 : w + 16'(PORTS);
                if (row_ends) row <= row + 1;
                if (row_ends || bank + 16'(PORTS) == 16'(BANKS)) begin
                    bank <= 0;
                    bank_at <= row_ends ? 0 : bank_at + 1;
                end else bank <= bank + 16'(PORTS);
            end
            if (params_left) begin
                param <= param + 1;
                column <= column + 16'(ROWS) == 16'(NARROW) ? 0 : column + 16'(ROWS);
                if (column + 16'(ROWS) == 16'(NARROW)) param_at <= param_at + 1;
            end
        end
        write_output <= TILE_OUT'(pop != 0) << row;
        for (int b = 0; b < BANKS; b++) begin
            write_bank[b] <= 16'(b) >= bank && 16'(b) < bank + 16'(PORTS) && pop[b%PORTS];
            write_data[b*PORT_BITS+:PORT_BITS] <= word[b%PORTS*PORT_BITS+:PORT_BITS];
        end
        write_at <= bank_at;
        for (int c = 0; c < NARROW; c++) begin
            write_params[c] <= params_pop && 16'(c) >= column && 16'(c) < column + 16'(ROWS);
            params_data[c*64+:64] <= params_word[c%ROWS*64+:64];
        end
        params_at <= param_at;
    end
endmodule
